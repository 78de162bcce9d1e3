"""Rows of a sequence in a head's order, blocks of it, and pools of rows, in plain PyTorch."""

from __future__ import annotations

import torch

from .layout import Geometry
from .pattern import SparsePattern

# Elements of one chunk of scores: bounds the scratch memory to a few hundred MB.
CHUNK_ELEMENTS = 1 << 24


def reordered_index(pattern: SparsePattern, heads: int) -> torch.Tensor:
    """Source row of every position of the reordered sequence, int64 `[heads, L]` (grid first, then context)."""
    g = pattern.geometry
    per_kv = pattern.tables.long()[pattern.order_of_head.long()] + g.prefix
    grid = per_kv.repeat_interleave(heads // pattern.kv_heads, 0)
    return torch.cat([grid, context_index(g, pattern.tables.device).expand(heads, -1)], 1)


def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of `x [B, H, L, D]` in the order `index [H, L]`, per head."""
    return x.gather(2, index[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


def context_index(g: Geometry, device) -> torch.Tensor:
    """Tokens outside the grid, int64 `[prefix + suffix]`."""
    return torch.cat(
        [torch.arange(g.prefix, device=device), torch.arange(g.prefix + g.grid_tokens, g.length, device=device)]
    )


def blocks_of(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Split dimension `dim` into blocks of `size`, the last one padded with zeros."""
    missing = -x.shape[dim] % size
    if missing:
        shape = list(x.shape)
        shape[dim] = missing
        x = torch.cat([x, x.new_zeros(shape)], dim)
    return x.unflatten(dim, (-1, size))


def block_sizes(g: Geometry, blocks: torch.Tensor) -> torch.Tensor:
    """Tokens in each of these query blocks, int64 like blocks."""
    return (g.grid_tokens - blocks * g.block_q).clamp_max(g.block_q)


def block_positions(g: Geometry, blocks: torch.Tensor, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in the order of the rows of query blocks, int64 `[n, rows]`, and which are real, bool.

    rows: so many of each block, spread evenly over it, all real; None takes all of them, up to the end of the grid.
    """
    if rows is None:
        position = blocks[:, None] * g.block_q + torch.arange(g.block_q, device=blocks.device)
        return position.clamp_max(g.grid_tokens - 1), position < g.grid_tokens
    within = (torch.arange(rows, device=blocks.device) + 0.5) / rows * block_sizes(g, blocks)[:, None]
    position = blocks[:, None] * g.block_q + within.long()
    return position, torch.ones_like(position, dtype=torch.bool)
