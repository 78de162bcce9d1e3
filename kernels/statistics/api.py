"""Attention mass of blocks: of every row, of sampled rows, and of given queries."""

from __future__ import annotations

import torch

from ..core.dispatch import STATISTICS_PRECISION, chosen_backend
from ..core.layout import Geometry
from .reference import BlockStatistics, block_statistics_reference, query_sums_reference, row_logsumexp_reference


def row_logsumexp(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """See `reference.row_logsumexp_reference`."""
    if chosen_backend(backend, q.device, q.dtype, q.shape[3], STATISTICS_PRECISION) == "reference":
        return row_logsumexp_reference(q, k, scale=scale, key_bias=key_bias)
    from .triton_statistics import launch_row_logsumexp

    return launch_row_logsumexp(q, k, scale=scale, key_bias=key_bias)


def block_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
    rows: torch.Tensor,
    *,
    q_blocks: torch.Tensor | None = None,
    scale: float | None = None,
    epsilon: float | None = None,
    rows_per_block: int | None = None,
    backend: str = "auto",
) -> BlockStatistics:
    """See `reference.block_statistics_reference`."""
    if chosen_backend(backend, q.device, q.dtype, q.shape[3], STATISTICS_PRECISION) == "reference":
        run = block_statistics_reference
    else:
        from .triton_statistics import launch_block_statistics as run
    rest = {"q_blocks": q_blocks, "scale": scale, "epsilon": epsilon, "rows_per_block": rows_per_block}
    return run(q, k, lse, geometry, rows, **rest)


def query_sums(
    queries: torch.Tensor,
    k: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    per_block: int,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """See `reference.query_sums_reference`."""
    if chosen_backend(backend, k.device, k.dtype, k.shape[3], STATISTICS_PRECISION) == "reference":
        run = query_sums_reference
    else:
        from .triton_query_sums import launch_query_sums as run
    return run(queries, k, geometry, tables, per_block, scale=scale, key_bias=key_bias)
