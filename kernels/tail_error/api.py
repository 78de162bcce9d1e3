"""What it costs the output that pooled keys and values stand for blocks: of each block, and of sampled rows."""

from __future__ import annotations

import torch

from ..core.dispatch import STATISTICS_PRECISION, chosen_backend
from ..core.layout import Geometry
from .reference import BlockCosts, RowMoments, block_costs_reference, row_moments_reference

# Wider heads, which no supported model has, would not fit the shared memory of the smaller GPUs.
TAIL_HEAD_DIM = 128


def _tail_backend(backend: str, q: torch.Tensor) -> str:
    chosen = chosen_backend(backend, q.device, q.dtype, q.shape[3], STATISTICS_PRECISION)
    return "reference" if q.shape[3] > TAIL_HEAD_DIM else chosen


def block_costs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    positions: torch.Tensor,
    *,
    pool: int,
    expanded: bool = False,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> BlockCosts:
    """See `tail_reference.block_costs_reference`; heads wider than TAIL_HEAD_DIM always go there."""
    if _tail_backend(backend, q) == "reference":
        run = block_costs_reference
    else:
        from .triton_block_costs import launch_block_costs as run
    rest = {"pool": pool, "expanded": expanded, "scale": scale, "key_bias": key_bias}
    return run(q, k, v, geometry, tables, positions, **rest)


def row_moments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    positions: torch.Tensor,
    levels: torch.Tensor,
    masks: int,
    *,
    pool: int,
    expansions: int = 0,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> RowMoments:
    """See `tail_reference.row_moments_reference`; heads wider than TAIL_HEAD_DIM always go there."""
    if _tail_backend(backend, q) == "reference":
        run = row_moments_reference
    else:
        from .triton_row_errors import launch_row_moments as run
    return run(
        q,
        k,
        v,
        geometry,
        tables,
        positions,
        levels,
        masks,
        pool=pool,
        expansions=expansions,
        scale=scale,
        key_bias=key_bias,
    )
