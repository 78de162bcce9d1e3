"""A plan made on one grid, used on another: orders carry over, masks are drawn anew from how attention falls off.

A plan holds, per head, how attention falls off with distance and which places draw more than that. From it follows
what each pair of blocks of the new grid should hold. Whether a head's reach is a number of tokens or a share of the
picture nobody can tell from one grid: both are predicted, and their mean ranks the pairs. Each head keeps its density
and a tenth more.

Nobody knows what a moved mask keeps until it is used, so the run measures it on a few rows and calibrates anew below a
floor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import torch

from ..kernels.problem import BLOCK_K, Geometry
from .falloff import axis_bins, stretch, unpack_falloff
from .orders import order_table
from .plan import Plan, PlanError, SitePlan, pack_bits, unpack_bits
from .recipes import query_block
from .selection import mass_kept
from .tail import kept_on_rows
from .tokens import TokenLayout

# A moved plan that keeps less than this share of what it should keep on the new grid is calibrated anew.
KEPT_FLOOR = 0.9
# A moved mask keeps this much more than the density it was made for: it is less exact than one made on the grid.
EXTRA = 1.1
# Pairs of tokens looked at per order, over all pairs of blocks; a block has no more than SAMPLES tokens looked at.
TOKEN_PAIRS = 1 << 26
SAMPLES = 64
# Heads whose pairs of blocks are predicted at a time: 4 bytes a pair and head.
HEADS_AT_ONCE = 32
# A head's threshold is looked for among about this many of its values.
THRESHOLD_VALUES = 1 << 16


def _coordinates(order: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """Token coordinates in whole tokens along F, H, W at each position of the order, int32 `[N, 3]`."""
    index = order_table(order, grid)
    _, h, w = grid
    return torch.stack([index // (h * w), index // w % h, index % w], 1)


@lru_cache(maxsize=64)
def _overlap(order: str, old: tuple[int, int, int], new: tuple[int, int, int]) -> torch.Tensor:
    """float32 `[new, old]` blocks of keys: share of a new block's tokens that lie in the region of an old one."""
    _, h, w = old
    position = torch.empty(math.prod(old), dtype=torch.long)
    table = order_table(order, old).long()
    position[table] = torch.arange(table.numel())
    at = _coordinates(order, new)
    f, y, x = (((at[:, axis] * 2 + 1) * old[axis] // (2 * new[axis])) for axis in range(3))
    old_block = position[((f * h + y) * w + x).long()] // BLOCK_K
    new_block = torch.arange(at.shape[0]) // BLOCK_K
    table = torch.zeros(-(-at.shape[0] // BLOCK_K), -(-position.numel() // BLOCK_K))
    table.index_put_((new_block, old_block), torch.ones(at.shape[0]), accumulate=True)
    return table / table.sum(1, keepdim=True)


def _sampled(tokens: int, block: int, samples: int, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of sampled tokens, int64 `[blocks, samples]`, and how many tokens each block has, int64 `[blocks]`.

    `step` shifts the samples within their share of the block, so that no period of the order escapes or fills them.
    """
    first = torch.arange(0, tokens, block)
    size = (tokens - first).clamp_max(block)
    shift = torch.arange(samples, dtype=torch.float64)
    inside = (shift + (shift * step % 1 if samples < block else 0)) / samples
    return first[:, None] + (inside * size[:, None]).long(), size


def _pairs(order: str, grid: tuple[int, int, int], block_q: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of blocks the bins of the distances of pairs of their tokens, int32 `[q * k, samples]`, and how
    many pairs of tokens they have, float32 `[q, k]`."""
    at, tokens = _coordinates(order, grid), math.prod(grid)
    blocks = -(-tokens // block_q) * -(-tokens // BLOCK_K)
    samples = SAMPLES
    while samples > 1 and blocks * samples**2 > TOKEN_PAIRS:
        samples //= 2
    (queries, of_q), (keys, of_k) = (
        _sampled(tokens, size, samples, step) for size, step in ((block_q, 0.618034), (BLOCK_K, 0.414214))
    )
    found = torch.zeros(queries.shape[0], keys.shape[0], samples, samples, dtype=torch.int32)
    for axis, extent in enumerate(grid):
        bins, centres = axis_bins(extent)
        q, k = at[queries, axis], at[keys, axis]
        away = (q[:, None, :, None] - k[None, :, None, :]).abs_()
        found = found.mul_(len(centres)).add_(bins.int()[away])
    return found.view(-1, samples**2), (of_q[:, None] * of_k).float()


@lru_cache(maxsize=16)
def _pair_counts(grid: tuple[int, int, int]) -> torch.Tensor:
    """Pairs of tokens per bin, float32 `[bins F, H, W]`."""
    counts = []
    for extent in grid:
        bins, centres = axis_bins(extent)
        pairs = torch.where(torch.arange(extent) > 0, 2, 1) * (extent - torch.arange(extent))
        counts.append(torch.zeros(len(centres)).index_add_(0, bins, pairs.float()))
    return torch.einsum("a,b,c->abc", *counts)


def _expected_falloff(falloff: torch.Tensor, old: tuple[int, int, int], new: tuple[int, int, int]) -> torch.Tensor:
    """Weights per bin of the new grid, float32 `[H, bins]`: both readings of distance, each with half of the mass."""
    total = 0
    for by_extent in (False, True):
        weights = stretch(falloff, old, new, by_extent)
        total = total + weights / (weights * _pair_counts(new)).sum((1, 2, 3), keepdim=True)
    return total.flatten(1)


def _best_blocks(expected: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
    """bool like `expected` `[H, q, k]`: the best `density` `[H]` of each head's blocks, and the best of every row."""
    flat = expected.flatten(1)
    wanted = (density * flat.shape[1]).round().clamp(1, flat.shape[1])
    some = flat[:, :: max(1, flat.shape[1] // THRESHOLD_VALUES)].sort(1, descending=True).values
    rank = (wanted / flat.shape[1] * some.shape[1]).round().long().clamp(1, some.shape[1]) - 1
    mask = flat >= some.gather(1, rank[:, None])
    # Equal values at the threshold would all be kept: of a head without any falloff that is every block.
    for head in (mask.sum(1) > 1.02 * wanted).nonzero()[:, 0].tolist():
        best = flat[head].topk(int(wanted[head])).indices
        mask[head] = torch.zeros_like(mask[head]).index_fill_(0, best, True)
    return mask.view_as(expected).scatter_(2, expected.argmax(2, keepdim=True), True)


def move_plan(plan: Plan, layout: TokenLayout) -> Plan:
    """The plan for another grid of the same model; `mass_kept` is what it should keep there, not measured.

    Raises PlanError for a plan that does not say how its heads' attention falls off.
    """
    old, new = plan.layout.grid, layout.grid
    if old == new:
        return plan if plan.layout == layout else replace(plan, layout=layout)
    block_q = query_block(layout.grid_tokens)
    by_order = defaultdict(list)
    for site, entry in plan.sites.items():
        if entry.falloff is None:
            raise PlanError(f"plan: {site.name} does not say how its attention falls off; it serves no other grid")
        for head, order in enumerate(entry.orders):
            by_order[order].append((site, head))
    shape, moved = None, {}
    for order, heads in by_order.items():
        bins, size = _pairs(order, new, block_q)
        shape, overlap = size.shape, _overlap(order, old, new)
        for first in range(0, len(heads), HEADS_AT_ONCE):
            some = heads[first : first + HEADS_AT_ONCE]
            packed = torch.stack([plan.sites[site].falloff[head] for site, head in some])
            falloff, draw = unpack_falloff(packed, old)
            table = _expected_falloff(falloff, old, new).T.contiguous()
            expected = torch.nn.functional.embedding_bag(bins, table, mode="mean").T.contiguous().view(-1, *shape)
            expected.mul_(size).mul_((draw @ overlap.T)[:, None])
            density = torch.stack([plan.sites[site].density[head] for site, head in some])
            mask = _best_blocks(expected, EXTRA * density)
            kept = mass_kept(expected, mask)
            moved.update({key: (pack_bits(m), kept[i]) for i, (key, m) in enumerate(zip(some, mask, strict=True))})
    sites = {}
    for site, entry in plan.sites.items():
        found = [moved[site, head] for head in range(len(entry.orders))]
        mask = torch.stack([unpack_bits(bits, shape) for bits, _ in found])
        sites[site] = SitePlan.create(entry.orders, mask, entry.tail_bias, torch.stack([kept for _, kept in found]))
    made = {**plan.made, "moved_from": "x".join(map(str, old))}
    return Plan(plan.identity, layout, block_q, sites, plan.pool, plan.settings, made)


class MovedPlanCheck:
    """What a moved plan keeps, measured on the rows of the first evaluation that uses it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._kept: dict = {}

    def measure(self, site, q: torch.Tensor, k: torch.Tensor, *, scale: float | None, key_bias) -> None:
        """Look at one site's call, q `[B, Hq, L, D]`, k `[B, Hkv, L, D]`; a site counts once."""
        entry = self.plan.sites.get(site)
        if entry is None or site in self._kept:
            return
        layout = self.plan.layout
        geometry = Geometry(layout.prefix, layout.grid, layout.suffix, self.plan.block_q)
        tables = torch.stack([order_table(name, layout.grid) for name in entry.orders]).to(q.device)
        kept = kept_on_rows(q, k, geometry, tables, entry.mask(q.device), scale=scale, key_bias=key_bias)
        self._kept[site] = kept.mean().item(), entry.mass_kept.mean().item()

    def verdict(self) -> tuple[bool, str] | None:
        """Whether the plan may stay, and a line about it; None before anything was measured."""
        if not self._kept:
            return None
        measured = sum(now for now, _ in self._kept.values()) / len(self._kept)
        expected = sum(then for _, then in self._kept.values()) / len(self._kept)
        stays = measured >= KEPT_FLOOR * expected
        text = (
            f"plan: moved from the grid {self.plan.made.get('moved_from', '?')}, keeps {measured:.1%} of the "
            f"attention, expected {expected:.1%}"
        )
        return stays, text if stays else f"{text}; calibrating anew"
