"""Attention mass of blocks: of every row, of sampled rows, and of given queries."""

from __future__ import annotations

import torch

from ..core.dispatch import uses_reference
from ..core.inputs import ScoreInputs
from ..core.layout import Geometry
from .reference import BlockStatistics, block_statistics_reference, query_sums_reference, row_logsumexp_reference


def row_logsumexp(scores: ScoreInputs, backend: str = "auto") -> torch.Tensor:
    """See `reference.row_logsumexp_reference`."""
    if uses_reference(backend, scores.q):
        return row_logsumexp_reference(scores)
    from .triton_statistics import launch_row_logsumexp

    return launch_row_logsumexp(scores)


def block_statistics(
    scores: ScoreInputs,
    lse: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    *,
    q_blocks: torch.Tensor | None = None,
    epsilon: float | None = None,
    backend: str = "auto",
) -> BlockStatistics:
    """See `reference.block_statistics_reference`."""
    if uses_reference(backend, scores.q):
        run = block_statistics_reference
    else:
        from .triton_statistics import launch_block_statistics as run
    return run(scores, lse, geometry, tables, q_blocks, epsilon)


def query_sums(
    scores: ScoreInputs, geometry: Geometry, tables: torch.Tensor, per_block: int, backend: str = "auto"
) -> torch.Tensor:
    """See `reference.query_sums_reference`."""
    if uses_reference(backend, scores.q):
        run = query_sums_reference
    else:
        from .triton_query_sums import launch_query_sums as run
    return run(scores, geometry, tables, per_block)
