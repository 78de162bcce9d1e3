"""A plan made on one grid, used on another: orders and masks follow from how attention falls off with distance.

A plan holds, per head, how attention falls off with distance and which places draw more than that. From it follows
what each pair of blocks of the new grid should hold, under any order. Whether a head's reach is a number of tokens or a
share of the picture nobody can tell from one grid: both are predicted, and their mean ranks orders and pairs. Each head
keeps its density and a tenth more.

Nobody knows what a moved mask keeps until it is used, so the run measures it on a few rows and calibrates anew below a
floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch

from ..kernels.kept_words import pack_bits, unpack_bits
from ..kernels.problem import BLOCK_K, Geometry
from .falloff import axis_bins, stretch, unpack_falloff
from .orders import order_table
from .plan import Plan, PlanError, Site, SitePlan
from .recipes import query_block
from .selection import mass_kept
from .statistics import SHARED_TOKENS, StatisticsOptions, first_best
from .tail import kept_on_rows
from .tokens import TokenLayout

# A moved plan that keeps less than this share of what it should keep on the new grid is calibrated anew.
KEPT_FLOOR = 0.9
# A moved mask keeps this much more than the density it was made for: it is less exact than one made on the grid.
EXTRA = 1.1
# Pairs of tokens looked at per order, over all pairs of blocks: all of them on grids of up to 8,192 tokens.
TOKEN_PAIRS = 1 << 26
# Blocks of queries by which orders are compared.
ORDER_ROWS = 32
# Heads whose pairs of blocks are predicted at a time: 4 bytes a pair and head.
HEADS_AT_ONCE = 32
# A head's threshold is looked for among about this many of its values.
THRESHOLD_VALUES = 1 << 14


def _coordinates(order: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """Token coordinates in whole tokens along F, H, W at each position of the order, int32 `[N, 3]`."""
    index = order_table(order, grid)
    _, h, w = grid
    return torch.stack([index // (h * w), index // w % h, index % w], 1)


def _draw_of_tokens(draw: torch.Tensor, order: str, old: tuple[int, int, int], new: tuple[int, int, int]):
    """What each token of the new grid draws, float32 `[N]`: as did the block of keys at its place, `[k_blocks]`."""
    table = order_table(order, old).long()
    tokens = torch.empty(table.numel())
    tokens[table] = draw.repeat_interleave(BLOCK_K)[: table.numel()]
    f, h, w = ((torch.arange(after) * 2 + 1) * before // (2 * after) for before, after in zip(old, new, strict=True))
    return tokens.view(old)[f[:, None, None], h[:, None], w].flatten()


def _draw_of_blocks(tokens: torch.Tensor, order: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """Mean over each block of keys, float32 `[H, k_blocks]` from `[H, N]`."""
    parts = tokens[:, order_table(order, grid).long()].split(BLOCK_K, 1)
    return torch.stack([part.mean(1) for part in parts], 1)


def _pairs_of_tokens(block_q: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of pairs of tokens within two blocks, float64 `[samples]` each, in shares of the block: all pairs, or
    `most` that cover both blocks and all combinations evenly (a lattice along the golden section)."""
    if block_q * BLOCK_K <= most:
        number = torch.arange(block_q * BLOCK_K, dtype=torch.float64)
        return (number // BLOCK_K) / block_q, (number % BLOCK_K) / BLOCK_K
    number = torch.arange(max(1, most), dtype=torch.float64) + 0.5
    return number / number.numel(), number * 0.6180339887498949 % 1


def _places(tokens: int, block: int, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of these shares of every block, int64 `[blocks, samples]`, and how many tokens each has, int64."""
    first = torch.arange(0, tokens, block)
    size = (tokens - first).clamp_max(block)
    return first[:, None] + (share * size[:, None] + 1e-9).long(), size


@dataclass(frozen=True)
class _Pairs:
    """Pairs of blocks under an order: `bins` int32 `[q * k, samples]`, of the distances of sampled pairs of their
    tokens, and `size` float32 `[q, k]`, how many pairs of tokens they have; on the device that is to do the work."""

    bins: torch.Tensor
    size: torch.Tensor

    @classmethod
    def of(
        cls, order: str, grid: tuple[int, int, int], block_q: int, rows: torch.Tensor | None = None, device="cpu"
    ) -> _Pairs:
        """All blocks of keys with all blocks of queries, or only with some `rows` of them, int64."""
        at, tokens = _coordinates(order, grid).to(device), math.prod(grid)
        blocks = -(-tokens // block_q) * -(-tokens // BLOCK_K)
        of_queries, of_keys = _pairs_of_tokens(block_q, TOKEN_PAIRS // blocks)
        queries, of_q = _places(tokens, block_q, of_queries)
        keys, of_k = _places(tokens, BLOCK_K, of_keys)
        if rows is not None:
            queries, of_q = queries[rows], of_q[rows]
        queries, keys = queries.to(device), keys.to(device)
        found = torch.zeros(queries.shape[0], keys.shape[0], queries.shape[1], dtype=torch.int32, device=device)
        for axis, extent in enumerate(grid):
            bins, centres = axis_bins(extent)
            away = (at[queries, axis][:, None] - at[keys, axis]).abs_()
            found = found.mul_(len(centres)).add_(bins.int().to(device)[away])
        return cls(found.flatten(0, 1), (of_q[:, None] * of_k).float().to(device))

    def expected(self, weights: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        """Attention per pair of blocks, up to a factor per head: float32 `[H, q, k]` for weights `[H, bins]` and what
        the blocks of keys draw, `[H, k]`."""
        weights, draw = weights.to(self.bins.device), draw.to(self.bins.device)
        mean = torch.nn.functional.embedding_bag(self.bins, weights.T.contiguous(), mode="mean")
        return mean.T.contiguous().view(-1, *self.size.shape).mul_(self.size).mul_(draw[:, None])


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
    wanted = (density.to(flat.device) * flat.shape[1]).round().clamp(1, flat.shape[1])
    some = flat[:, :: max(1, flat.shape[1] // THRESHOLD_VALUES)].sort(1, descending=True).values
    rank = (wanted / flat.shape[1] * some.shape[1]).round().long().clamp(1, some.shape[1]) - 1
    mask = flat >= some.gather(1, rank[:, None])
    # Equal values at the threshold would all be kept: of a head without any falloff that is every block.
    for head in (mask.sum(1) > 1.1 * wanted).nonzero()[:, 0].tolist():
        best = flat[head].topk(int(wanted[head])).indices
        mask[head] = torch.zeros_like(mask[head]).index_fill_(0, best, True)
    return mask.view_as(expected).scatter_(2, expected.argmax(2, keepdim=True), True)


class _Move:
    """What every head of a plan should attend to on another grid."""

    def __init__(self, plan: Plan, grid: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.plan, self.old, self.grid, self.device = plan, plan.layout.grid, grid, device
        self.block_q = query_block(math.prod(grid))
        self.heads = [(site, head) for site, entry in plan.sites.items() for head in range(len(entry.orders))]

    def _some(self, heads: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Some heads' weights `[n, bins]` on the new grid, what its tokens draw `[n, N]`, densities `[groups, n]`."""
        entries = [(self.plan.sites[site], head) for site, head in heads]
        falloff, draw = unpack_falloff(torch.stack([entry.falloff[head] for entry, head in entries]), self.old)
        tokens = [
            _draw_of_tokens(row, entry.orders[head], self.old, self.grid)
            for row, (entry, head) in zip(draw, entries, strict=True)
        ]
        density = torch.stack([entry.density[:, head] for entry, head in entries], 1)
        return _expected_falloff(falloff, self.old, self.grid), torch.stack(tokens), density

    def orders(self) -> dict[Site, list[str]]:
        """The order of each head: that under which its best blocks should hold most, as when it was calibrated.

        Heads that share keys must share an order. The plan does not say which do, but they are neighbours and share
        one already: neighbours of one order get one order.
        """
        options = StatisticsOptions(0, "original" if self.plan.settings.get("order") == "original" else "mass")
        candidates = options.candidates(self.grid)
        blocks = -(-math.prod(self.grid) // self.block_q)
        rows = torch.linspace(0, blocks - 1, min(blocks, ORDER_ROWS)).round().long()
        pairs = [_Pairs.of(order, self.grid, self.block_q, rows, self.device) for order in candidates]
        scores = {}
        for heads in _batches(self.heads):
            weights, tokens, density = self._some(heads)
            for number, order in enumerate(candidates):
                expected = pairs[number].expected(weights, _draw_of_blocks(tokens, order, self.grid))
                kept = mass_kept(expected, _best_blocks(expected, density.mean(0))).cpu()
                scores.update({(*key, number): value for key, value in zip(heads, kept, strict=True)})
        chosen = {}
        for site, entry in self.plan.sites.items():
            found = torch.tensor(
                [[scores[site, h, n] for n in range(len(candidates))] for h in range(len(entry.orders))]
            )
            chosen[site] = []
            for _, run in groupby(range(len(entry.orders)), key=entry.orders.__getitem__):
                run = list(run)
                chosen[site] += [candidates[first_best(found[run].mean(0, keepdim=True))]] * len(run)
        return chosen

    def sites(self, orders: dict[Site, list[str]]) -> dict[Site, SitePlan]:
        """Masks under these orders; on large grids runs measure them themselves."""
        if math.prod(self.grid) > SHARED_TOKENS:
            blocks = tuple(-(-math.prod(self.grid) // size) for size in (self.block_q, BLOCK_K))
            return {
                site: replace(
                    entry,
                    orders=tuple(orders[site]),
                    packed=entry.packed.new_empty(entry.groups, 0),
                    shape=(len(entry.orders), *blocks),
                    falloff=None,
                )
                for site, entry in self.plan.sites.items()
            }
        moved = {}
        for order in {name for names in orders.values() for name in names}:
            pairs = _Pairs.of(order, self.grid, self.block_q, device=self.device)
            for heads in _batches([(site, head) for site, head in self.heads if orders[site][head] == order]):
                weights, tokens, density = self._some(heads)
                expected = pairs.expected(weights, _draw_of_blocks(tokens, order, self.grid))
                for group, its in enumerate(density):
                    masks = _best_blocks(expected, EXTRA * its)
                    kept = mass_kept(expected, masks).cpu()
                    for key, mask, share in zip(heads, masks, kept, strict=True):
                        moved[(*key, group)] = pack_bits(mask).cpu(), share
        made = {}
        for site, entry in self.plan.sites.items():
            groups = []
            for group in range(entry.groups):
                found = [moved[site, head, group] for head in range(len(entry.orders))]
                mask = torch.stack([unpack_bits(bits, pairs.size.shape) for bits, _ in found])
                bias = None if entry.tail_bias is None else entry.tail_bias[group]
                kept = torch.stack([kept for _, kept in found])
                groups.append(SitePlan.create(orders[site], mask, bias, kept, rotate=entry.rotate))
            made[site] = SitePlan.joined(groups)
        return made


def _batches(heads: list) -> Iterator[list]:
    return (heads[first : first + HEADS_AT_ONCE] for first in range(0, len(heads), HEADS_AT_ONCE))


def move_plan(plan: Plan, layout: TokenLayout, device: torch.device | str = "cpu") -> Plan:
    """The plan for another grid of the same model; `mass_kept` is what it should keep there, not measured.

    device: what does the work, minutes on a CPU for a large model at 720p; the result is on the CPU. Raises PlanError
    for a plan that does not say how its heads' attention falls off.
    """
    if plan.layout.grid == layout.grid:
        return plan if plan.layout == layout else replace(plan, layout=layout)
    for entry in plan.sites.values():
        if entry.falloff is None:
            grid = " x ".join(map(str, plan.layout.grid))
            raise PlanError(f"plan: serves its own size of {grid} tokens only; make one for this size")
    move = _Move(plan, layout.grid, device)
    made = {**plan.made, "moved_from": "x".join(map(str, plan.layout.grid))}
    return Plan(
        plan.identity, layout, move.block_q, move.sites(move.orders()), plan.pool, plan.settings, made, plan.expansions
    )


class MovedPlanCheck:
    """What a moved plan keeps, measured on the rows of the first evaluation that uses it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._kept: dict = {}

    def measure(
        self, site, layout: TokenLayout, q: torch.Tensor, k: torch.Tensor, *, scale: float | None, key_bias
    ) -> None:
        """Look at one site's call, q `[B, Hq, L, D]`, k `[B, Hkv, L, D]`; a site counts once. layout: of this call, on
        the plan's grid; what stands beside the grid may differ from site to site."""
        entry = self.plan.sites.get(site)
        if entry is None or site in self._kept or not entry.has_masks:
            return
        geometry = Geometry(layout.prefix, layout.grid, layout.suffix, self.plan.block_q)
        tables = torch.stack([order_table(name, layout.grid) for name in entry.orders]).to(q.device)
        # The group in the middle stands for all: its density is the nearest to their mean.
        mask = entry.mask(q.device, entry.groups // 2)
        kept = kept_on_rows(q, k, geometry, tables, mask, scale=scale, key_bias=key_bias)
        self._kept[site] = kept.mean().item(), entry.mass_kept[entry.groups // 2].mean().item()

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
