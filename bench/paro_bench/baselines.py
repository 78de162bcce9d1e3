"""Masks of other methods, on the runtime's blocks, to be compared at equal density. Rows are queries, columns keys."""

from __future__ import annotations

import torch

from ...kernels.core.layout import Geometry


def keep_smallest(rank: torch.Tensor, density: float) -> torch.Tensor:
    """bool `[q_blocks, k_blocks]`: the `density` smallest ranks and the smallest of every row."""
    count = round(density * rank.numel())
    mask = torch.zeros_like(rank, dtype=torch.bool)
    mask.view(-1)[rank.flatten().argsort(stable=True)[:count]] = True
    return mask.scatter_(1, rank.argmin(1, keepdim=True), True)


def _centres(blocks: int, size: int, tokens: int) -> torch.Tensor:
    return (torch.arange(blocks) * size + size / 2).clamp_max(tokens - 1)


def radial_mask(geometry: Geometry, density: float) -> torch.Tensor:
    """Radial attention's rule (arXiv 2506.19852) in FHW order: the spatial window halves per doubled frame distance."""
    frame = geometry.grid[1] * geometry.grid[2]
    q = _centres(geometry.q_blocks, geometry.block_q, geometry.grid_tokens)
    k = _centres(geometry.k_blocks, geometry.block_k, geometry.grid_tokens)
    frames = ((q // frame)[:, None] - (k // frame)[None]).abs()
    inside = ((q % frame)[:, None] - (k % frame)[None]).abs() / frame
    group = torch.where(frames == 0, 0, frames.clamp_min(1).log2().floor() + 1)
    rank = (inside + 0.05) * 2**group + 0.001 * frames
    own = (torch.arange(geometry.q_blocks) * geometry.block_q // geometry.block_k).clamp_max(geometry.k_blocks - 1)
    rank[torch.arange(geometry.q_blocks), own] = -1
    return keep_smallest(rank, density)


def band_mask(geometry: Geometry, density: float) -> torch.Tensor:
    """A band around the diagonal: in FHW order a window over frames, in HWF order one over places (SVG's two kinds)."""
    q = _centres(geometry.q_blocks, geometry.block_q, geometry.grid_tokens)
    k = _centres(geometry.k_blocks, geometry.block_k, geometry.grid_tokens)
    return keep_smallest((q[:, None] - k[None]).abs(), density)


def random_mask(geometry: Geometry, density: float, seed: int) -> torch.Tensor:
    """Random blocks and the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(geometry.q_blocks, geometry.k_blocks, generator=generator)
    own = (torch.arange(geometry.q_blocks) * geometry.block_q // geometry.block_k).clamp_max(geometry.k_blocks - 1)
    rank[torch.arange(geometry.q_blocks), own] = -1
    return keep_smallest(rank, density)
