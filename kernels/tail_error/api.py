"""What it costs the output that pooled keys and values stand for blocks: of each block, and of sampled rows."""

from __future__ import annotations

import torch

from ..core.dispatch import uses_reference
from ..core.inputs import AttentionInputs
from .reference import BlockCosts, RowMoments, block_costs_reference, row_moments_reference

# Wider heads, which no supported model has, would not fit the shared memory of the smaller GPUs.
TAIL_HEAD_DIM = 128


def _uses_reference(backend: str, q: torch.Tensor) -> bool:
    return uses_reference(backend, q) or q.shape[3] > TAIL_HEAD_DIM


def block_costs(
    inputs: AttentionInputs, positions: torch.Tensor, *, pool: int, expanded: bool = False, backend: str = "auto"
) -> BlockCosts:
    """See `reference.block_costs_reference`, which always serves heads wider than TAIL_HEAD_DIM. Triton takes 1, 2, 4,
    ... or 64 rows of each query block and raises ValueError for other numbers."""
    if _uses_reference(backend, inputs.q):
        run = block_costs_reference
    else:
        from .triton_block_costs import launch_block_costs as run
    return run(inputs, positions, pool=pool, expanded=expanded)


def row_moments(
    inputs: AttentionInputs,
    positions: torch.Tensor,
    levels: torch.Tensor,
    masks: int,
    *,
    pool: int,
    expansions: int = 0,
    backend: str = "auto",
) -> RowMoments:
    """See `reference.row_moments_reference`, which always serves heads wider than TAIL_HEAD_DIM."""
    if _uses_reference(backend, inputs.q):
        run = row_moments_reference
    else:
        from .triton_row_errors import launch_row_moments as run
    return run(inputs, positions, levels, masks, pool=pool, expansions=expansions)
