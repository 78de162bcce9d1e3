"""What the attention benchmark runs: real models' shapes, masks of a given density, and exact rows to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.pattern import MOST_EXPANSIONS, SparsePattern
from comfyui_paro.kernels.pooling.reference import expanded_pools, mean_queries, stretch_of_rows, stretches_of


@dataclass(frozen=True)
class Shape:
    """One self-attention of a model: token layout (prefix, F x H x W, suffix), heads and head dimension."""

    prefix: int
    grid: tuple[int, int, int]
    suffix: int
    heads: int
    dim: int
    note: str

    @property
    def length(self) -> int:
        return self.prefix + math.prod(self.grid) + self.suffix


SHAPES = {
    "wan720p": Shape(0, (21, 45, 80), 0, 40, 128, "Wan 2.1 14B, 1280x720, 81 frames"),
    "wan480p": Shape(0, (21, 30, 52), 0, 40, 128, "Wan 2.1 14B, 832x480, 81 frames"),
    "wan480p_small": Shape(0, (21, 30, 52), 0, 12, 128, "Wan 2.1 1.3B, 832x480, 81 frames"),
    "hunyuan15": Shape(0, (31, 45, 80), 256, 16, 128, "HunyuanVideo 1.5, 1280x720, 121 frames"),
    "ltx": Shape(0, (13, 16, 24), 0, 32, 64, "LTX-Video 2B, 768x512, 97 frames"),
    "flux": Shape(512, (1, 64, 64), 0, 24, 128, "Flux.1, 1024x1024"),
    "tiny": Shape(3, (2, 8, 13), 0, 2, 64, "no model: a smoke test"),
    "flux2048": Shape(512, (1, 128, 128), 0, 24, 128, "Flux.1, 2048x2048"),
}
AXES = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))


def inputs(shape: Shape, heads: int, dtype: torch.dtype, device, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v `[1, heads, L, D]` as views of `[1, L, heads * D]`, unit normal; K has channel outliers of 3 sigma."""
    generator = torch.Generator(device).manual_seed(seed)
    result = []
    for _ in range(3):
        x = torch.randn(1, shape.length, heads * shape.dim, generator=generator, device=device, dtype=dtype)
        result.append(x.view(1, shape.length, heads, shape.dim).transpose(1, 2))
    result[1] += 3 * torch.randn(1, heads, 1, shape.dim, generator=generator, device=device, dtype=dtype)
    return result


def order_tables(grid: tuple[int, int, int], device) -> torch.Tensor:
    """The six axis orders, int32 `[6, F*H*W]`."""
    index = torch.arange(math.prod(grid), dtype=torch.int32, device=device).view(grid)
    return torch.stack([index.permute(axes).flatten() for axes in AXES])


def block_mask(kind: str, density: float, heads: int, geometry: Geometry, device, seed: int = 0) -> torch.Tensor:
    """Kept blocks, bool `[heads, q_blocks, k_blocks]`, every row keeping the same number: `random` or `structured`.

    Structured: a diagonal band, in every second head a comb beside it, as axis-wise attention shows after reordering.
    """
    rows, columns = geometry.q_blocks, geometry.k_blocks
    keep = max(1, round(density * columns))
    generator = torch.Generator(device).manual_seed(seed)
    if kind == "random":
        score = torch.rand(heads, rows, columns, generator=generator, device=device)
    else:
        i = torch.arange(rows, device=device)[:, None] * (geometry.block_q / geometry.block_k)
        j = torch.arange(columns, device=device)[None]
        distance = (i - j).abs()
        teeth = max(2, round(2 / density))
        comb = torch.where((j - i.long()) % teeth == 0, distance * 1e-3, distance)
        score = -torch.stack([comb if h % 2 else distance for h in range(heads)])
    best = score.topk(keep, 2).indices
    return torch.zeros(heads, rows, columns, dtype=torch.bool, device=device).scatter_(2, best, True)


def pattern(
    shape: Shape, heads: int, density: float, kind: str, tail: bool, device, block_q: int = 64
) -> SparsePattern:
    """A pattern of this density, its pools expanded as runs have them; density 1 keeps everything without a list."""
    geometry = Geometry(shape.prefix, shape.grid, shape.suffix, block_q)
    bias = torch.full((heads,), 0.4, device=device) if tail else None
    orders = torch.arange(heads, device=device, dtype=torch.int32) % len(AXES)
    tables = order_tables(shape.grid, device)
    if density >= 1:
        return SparsePattern(geometry, tables, orders, None, bias)
    mask = block_mask(kind, density, heads, geometry, device)
    return SparsePattern.from_mask(geometry, tables, orders, mask, bias, expansions=MOST_EXPANSIONS)


def exact_rows(q, k, v, p: SparsePattern, head: int, rows: torch.Tensor) -> torch.Tensor:
    """Attention of some original rows of one head in float32, `[rows, D]`: every key scored, the mask applied to it."""
    g = p.geometry
    table = p.tables[p.order_of_head[head]].long()
    kf, vf = k[0, head].float(), v[0, head].float()
    scale = q.shape[3] ** -0.5
    scores = q[0, head, rows].float() @ kf.T * scale
    if p.kept_words is None:
        return scores.softmax(1) @ vf
    position = torch.empty_like(table)
    position[table] = torch.arange(table.numel(), device=table.device)
    in_grid = (rows >= g.prefix) & (rows < g.prefix + g.grid_tokens)
    place = position[(rows - g.prefix).clamp(0, g.grid_tokens - 1)]
    kept = p.mask[head][place // g.block_q] | ~in_grid[:, None]
    keep_key = torch.ones_like(scores, dtype=torch.bool)
    keep_key[:, g.prefix : g.prefix + g.grid_tokens] = kept[:, position // g.block_k]
    scores = scores.masked_fill(~keep_key, -torch.inf)
    if p.tail_bias is None:
        return scores.softmax(1) @ vf
    queries, keys, values = (x[table + g.prefix][None, None] for x in (q[0, head].float(), kf, vf))
    pools = expanded_pools(mean_queries(queries, g, p.expansions), keys, values, p.pool, scale=scale)
    stretch = stretch_of_rows(g, stretches_of(g, p.expansions), place)
    tail = pools.logits(q[None, None, 0, head, rows].float(), stretch, scale)[0, 0] + p.tail_bias[head]
    tail = tail.masked_fill(kept.repeat_interleave(g.block_k // p.pool, 1)[:, : tail.shape[1]], -torch.inf)
    weights = torch.cat([scores, tail], 1).softmax(1)
    return weights[:, : g.length] @ vf + pools.weighted(weights[None, None, :, g.length :], stretch)[0, 0]
