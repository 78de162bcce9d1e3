"""How a head's attention falls off with distance on the token grid: what a plan must know to serve another grid.

While a site is observed, a few hundred evenly spread queries measure the mean weight that a key gets at each distance
along F, H and W, distances in bins that widen (one token apart at first). That, and how much more than this each block
of keys draws (sinks do), is stored with the plan in a byte per number: a few kilobytes a head.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from ..kernels.problem import BLOCK_K
from .orders import order_number, order_tables
from .tokens import TokenLayout

# The distances, in tokens, at which bins begin.
EDGES = (0, 1, 2, 3, 4, 5, 7, 9, 12, 16, 22, 30, 42, 60, 85, 120, 170, 240, 340, 480)
ROWS = 256
# Bytes of attention rows that may be held at a time, beside a model's activations.
GROUP_BYTES = 1 << 26
# Fewer rows where an axis is so long that its table of bins would hold more numbers than this.
ONE_HOT_ELEMENTS = 1 << 24
# Bytes are logarithms: of the weight in steps of a tenth below the largest, of what a block draws in twentieths.
WEIGHT_STEPS, DRAW_STEPS, DRAW_ZERO = 10, 20, 128
# Powers of the root of x^4 = x + 1 spread points over a box more evenly than chance does.
_SPREAD = tuple(1.2207440846057596**-power for power in (1, 2, 3))


@lru_cache(maxsize=64)
def axis_bins(extent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bin of each distance 0 .. extent - 1, int64, and the mean distance of each bin, float32.

    The last quarter of the extent starts no bin: too few pairs of tokens are that far apart to measure by.
    """
    edges = torch.tensor([edge for edge in EDGES if edge == 0 or 4 * edge < 3 * extent])
    distance = torch.arange(extent)
    bins = torch.searchsorted(edges, distance, right=True) - 1
    centres = torch.zeros(len(edges)).index_add_(0, bins, distance.float()) / bins.bincount()
    return bins, centres


def falloff_shape(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """Bins along F, H, W."""
    return tuple(len(axis_bins(extent)[1]) for extent in grid)


def packed_width(grid: tuple[int, int, int]) -> int:
    """Bytes per head that `pack_falloff` makes: one per bin and one per block of keys."""
    return math.prod(falloff_shape(grid)) + -(-math.prod(grid) // BLOCK_K)


def falloff_bytes(grid: tuple[int, int, int]) -> int:
    """Bytes of memory that `pack_falloff` takes for each head."""
    return 20 * math.prod(grid)


@lru_cache(maxsize=4)
def _rows(
    grid: tuple[int, int, int], rows: int, device: torch.device
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    """Grid index of the sampled queries, int64 `[n]`; the bin of every coordinate as seen from each, one-hot float32
    `[n, extent, bins]` per axis; how many pairs fall into each bin, float32 `[bins F, H, W]`."""
    tokens, longest = math.prod(grid), max(grid)
    rows = min(rows, max(32, ONE_HOT_ELEMENTS // (longest * len(EDGES))))
    if tokens <= rows:
        index = torch.arange(tokens)
        at = torch.stack([index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]], 1)
    else:
        number = torch.arange(rows, dtype=torch.float64)[:, None]
        at = ((0.5 + number * torch.tensor(_SPREAD, dtype=torch.float64)) % 1 * torch.tensor(grid)).long()
        index = (at[:, 0] * grid[1] + at[:, 1]) * grid[2] + at[:, 2]
    seen = []
    for axis, extent in enumerate(grid):
        bins, centres = axis_bins(extent)
        away = (torch.arange(extent) - at[:, axis, None]).abs()
        seen.append((bins[away][..., None] == torch.arange(len(centres))).float())
    pairs = torch.einsum("ra,rb,rc->abc", *(s.sum(1) for s in seen))
    return index.to(device), tuple(s.to(device) for s in seen), pairs.to(device)


def observe_falloff(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: TokenLayout,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    rows: int = ROWS,
) -> torch.Tensor:
    """Mean attention weight of a key by its distance from the query: float32 `[Hq, bins F * H * W]`, W fastest.

    q `[B, Hq, L, D]`, k `[B, Hkv, L, D]`, key_bias `[B, L]`. Costs rows / L of a product Q K^T.
    """
    batch, heads, _, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    index, (by_f, by_h, by_w), pairs = _rows(layout.grid, rows, q.device)
    f, h, w = layout.grid
    # Weights of 75,600 keys would be subnormal in fp16; what is kept is rounded to a tenth in the end.
    dtype = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    by_f, by_w = by_f.transpose(1, 2).to(dtype), by_w.to(dtype)
    total = torch.zeros(heads, *pairs.shape, device=q.device)
    group = heads // k.shape[1]
    queries = (q[:, :, index + layout.prefix].float() * scale).to(dtype).unflatten(1, (-1, group))
    # A row's logits, weights and a copy, a few key heads at a time: a loop over heads would launch too much.
    step = max(1, GROUP_BYTES // (3 * dtype.itemsize * index.numel() * layout.length * group))
    for b in range(batch):
        for first in range(0, k.shape[1], step):
            some = slice(first, first + step)
            keys = k[b, some].to(dtype).transpose(1, 2)
            logits = (queries[b, some].flatten(1, 2) @ keys).view(-1, index.numel(), layout.length)
            if key_bias is not None:
                logits += key_bias[b].to(dtype)
            weights = logits.softmax(2)[:, :, layout.prefix : layout.prefix + layout.grid_tokens]
            # Frames first: the longest rows then stay whole. An image has one, in one bin.
            along_f = weights.reshape(*weights.shape[:2], f, h * w)
            along_f = along_f if f == 1 else by_f @ along_f
            along_w = along_f.unflatten(3, (h, w)).flatten(2, 3) @ by_w
            of_heads = slice(first * group, (first + step) * group)
            total[of_heads] += torch.einsum("xrahc,rhb->xabc", along_w.unflatten(2, (-1, h)).float(), by_h)
    return (total / (batch * pairs.clamp_min(1))).flatten(1)


@lru_cache(maxsize=16)
def _places_away(extent: int, device: torch.device) -> torch.Tensor:
    """From each place of an axis, how many places lie in each bin of distance: float32 `[extent, bins]`."""
    bins, centres = axis_bins(extent)
    counts = bins.bincount()
    last = counts.cumsum(0) - 1
    first = (last - counts + 1).clamp_min(1)
    place = torch.arange(extent)[:, None]
    sides = [(last.minimum(room) - first + 1).clamp_min(0) for room in (place, extent - 1 - place)]
    here = torch.arange(len(centres)) == 0
    return (sides[0] + sides[1] + here).float().to(device)


def _received(falloff: torch.Tensor, grid: tuple[int, int, int], orders) -> torch.Tensor:
    """Attention that each block of keys of a head's order would get if distance were all: float32 `[H, k_blocks]` for
    falloff `[H, bins]`."""
    device = falloff.device
    table = falloff.unflatten(1, falloff_shape(grid))
    for extent in grid:
        # Contracting the first axis puts its places last: after three rounds the axes stand as they did.
        table = torch.tensordot(table, _places_away(extent, device), ([1], [1]))
    numbers = torch.tensor([order_number(name) for name in orders], device=device)
    per_token = table.flatten(1).gather(1, order_tables(grid, device)[numbers].long())
    missing = -per_token.shape[1] % BLOCK_K
    return torch.nn.functional.pad(per_token, (0, missing)).unflatten(1, (-1, BLOCK_K)).sum(2)


def pack_falloff(falloff: torch.Tensor, received: torch.Tensor, orders, grid: tuple[int, int, int]) -> torch.Tensor:
    """uint8 `[H, packed_width(grid)]` from falloff `[H, bins]` and the attention each block of keys of the heads'
    orders got, `[H, k_blocks]`, on their device. Only ratios within a head are kept."""
    falloff = falloff.float().clamp_min(1e-30)
    expected = _received(falloff, grid, orders)
    draw = received.float().clamp_min(1e-30) / expected
    draw = draw / (draw * expected).sum(1, keepdim=True) * expected.sum(1, keepdim=True)
    weight = 255 + WEIGHT_STEPS * (falloff / falloff.amax(1, keepdim=True)).log()
    packed = torch.cat([weight, DRAW_ZERO + DRAW_STEPS * draw.log()], 1)
    return packed.round().clamp(0, 255).to(torch.uint8)


def unpack_falloff(packed: torch.Tensor, grid: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights relative to the head's largest, float32 `[H, bins F, H, W]`, and the factor by which each block of keys
    draws more than that, float32 `[H, k_blocks]`."""
    shape = falloff_shape(grid)
    weight, draw = packed.float().split([math.prod(shape), packed.shape[1] - math.prod(shape)], 1)
    weight = ((weight - 255) / WEIGHT_STEPS).exp()
    return weight.unflatten(1, shape), ((draw - DRAW_ZERO) / DRAW_STEPS).exp()


def stretch(
    falloff: torch.Tensor, old: tuple[int, int, int], new: tuple[int, int, int], by_extent: bool
) -> torch.Tensor:
    """Weights `[H, bins F, H, W]` of one grid for the bins of another.

    by_extent: distances count in shares of the grid's extent, otherwise in tokens. Between the centres of bins the
    logarithms are mixed; beyond the last bin its weight holds.
    """
    logs = falloff.log()
    for axis, (before, after) in enumerate(zip(old, new, strict=True), 1):
        centres, wanted = axis_bins(before)[1], axis_bins(after)[1]
        if by_extent:
            wanted = wanted * (before / after)
        if len(centres) == 1:
            logs = logs.repeat_interleave(len(wanted), axis)
            continue
        upper = torch.searchsorted(centres, wanted).clamp(1, len(centres) - 1)
        part = ((wanted - centres[upper - 1]) / (centres[upper] - centres[upper - 1])).clamp(0, 1)
        part = part.view([-1 if a == axis else 1 for a in range(4)])
        logs = logs.index_select(axis, upper - 1) * (1 - part) + logs.index_select(axis, upper) * part
    return logs.exp()
