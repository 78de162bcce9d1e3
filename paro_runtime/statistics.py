"""From one site's queries and keys to block statistics: which order suits each head, and what its blocks hold.

No pass looks at more rows than it must. Some rows of some query blocks under every candidate order, to choose: their
log-sum-exp, then their block sums. Then, under the chosen orders and where the values are at hand, the tail's errors on
a few rows of every block, which tell the block sums too. For ten orders on 75,600 tokens that is half a product Q K^T
and half a dense attention. Without values, or for masks by mass, block sums of every row instead: two products more.
The falloff with distance comes from a few hundred rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from ..kernels.api import block_statistics, row_logsumexp
from ..kernels.problem import Geometry
from ..kernels.statistics_reference import BlockStatistics, block_positions
from .falloff import observe_falloff
from .orders import ORIGINAL, candidate_orders, order_table, tiled_orders
from .rotation import logit_errors
from .selection import mass_kept_scores, paper_scores
from .tail import TailObservation, observe_tail
from .tokens import TokenLayout

# Query blocks looked at when choosing an order, evenly spread, and rows in each of them: what a choice can go wrong by
# depends on how many rows were seen, not on their share. Fewer where there are few, for the cost's sake.
ORDER_BLOCKS, ORDER_BLOCKS_OF_FEW, FEW_BLOCKS = 48, 32, 128
ORDER_ROWS = 32
# Up to this many grid tokens every row is looked at, under all orders in one go (`masses_by_membership`): samples of so
# few rows took orders that cost 1 to 3 dB on the tiny model.
MEMBERSHIP_TOKENS = 4096


@dataclass(frozen=True)
class StatisticsOptions:
    """How sites are observed.

    density: at which orders are compared. order: `mass`, `paper` or `original`. tiles: offer tiled orders to `mass`.
    pool: tokens per pooled key, None without a tail. pooled_mass: also measure the mass of pooled keys, for a bias that
    only makes the total mass right. every_row: block sums of every row, for masks that are chosen by mass, even where
    the tail's sampled rows tell them. alpha, sigma: of the paper's metric.
    """

    density: float
    order: str = "mass"
    pool: int | None = 64
    tiles: bool = True
    pooled_mass: bool = False
    every_row: bool = False
    alpha: float = 0.5
    sigma: float = 1.0

    def candidates(self, grid: tuple[int, int, int]) -> tuple[str, ...]:
        """Names of the orders to compare on this grid, FHW first."""
        if self.order == "original":
            return (ORIGINAL,)
        return candidate_orders(grid) + (tiled_orders(grid) if self.tiles and self.order == "mass" else ())


@dataclass(frozen=True)
class Observation:
    """What one attention call told. H = query heads.

    scores  float32 [H, candidates], higher is better; the names are in `candidates`.
    choice  int64 [H]: index of the order under which the rest was taken.
    mass    float32 [H, q_blocks, k_blocks]: attention in each block, of all rows or estimated from the tail's.
    falloff float32 [H, bins]: mean weight of a key by its distance, see `falloff.observe_falloff`.
    pooled  the same as mass with pooled keys, or None unless asked for.
    tail    errors of the tail, or None without a tail or without values.
    logit_errors float32 [H, 3]: what quantising does to the logits, see `rotation.logit_errors`.
    """

    candidates: tuple[str, ...]
    scores: torch.Tensor
    choice: torch.Tensor
    mass: torch.Tensor
    falloff: torch.Tensor
    pooled: torch.Tensor | None = None
    tail: TailObservation | None = None
    logit_errors: torch.Tensor | None = None


def geometry_of(layout: TokenLayout, block_q: int) -> Geometry:
    """The kernels' view of a layout."""
    return Geometry(layout.prefix, layout.grid, layout.suffix, block_q)


@lru_cache(maxsize=32)
def _table_on(name: str, grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """The order's table on a device: every site of a run asks for the same ten."""
    return order_table(name, grid).to(device)


def order_sample(q_blocks: int, device: torch.device) -> torch.Tensor:
    """Evenly spread query blocks for choosing the order, int64, rising."""
    count = min(q_blocks, ORDER_BLOCKS_OF_FEW if q_blocks <= FEW_BLOCKS else ORDER_BLOCKS)
    return torch.linspace(0, q_blocks - 1, count, device=device).round().long().unique()


def observe(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: TokenLayout,
    block_q: int,
    options: StatisticsOptions,
    *,
    v: torch.Tensor | None = None,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    previous_scores: torch.Tensor | None = None,
    backend: str = "auto",
) -> Observation:
    """Statistics of one call; q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]`, key_bias `[B, L]`.

    previous_scores `[Hq, candidates]` of earlier calls are added before choosing, so that the choice rests on all.
    The query heads that share a key head share its order, since the keys are reordered once.
    """
    geometry = geometry_of(layout, block_q)
    candidates = options.candidates(layout.grid)
    heads, kv_heads = q.shape[1], k.shape[1]
    tables = [_table_on(name, layout.grid, q.device) for name in candidates]
    rest = {"scale": scale, "backend": backend}

    @cache
    def lse() -> torch.Tensor:
        """Of every row: a product Q K^T that the usual path on a GPU does without."""
        return row_logsumexp(q, k, key_bias=key_bias, **rest)

    scores = torch.zeros(heads, len(candidates), device=q.device)
    masses = None
    if layout.grid_tokens <= MEMBERSHIP_TOKENS and options.order != "paper":
        masses = masses_by_membership(q, k, lse(), geometry, tables, scale)
        scores = mass_kept_scores([BlockStatistics(mass) for mass in masses], options.density)
    elif len(candidates) > 1 and options.order == "paper":
        sample = order_sample(geometry.q_blocks, q.device)
        looks = {"q_blocks": sample, "epsilon": 1 / geometry.grid_tokens, **rest}
        seen = [block_statistics(q, k, lse(), geometry, table.expand(heads, -1), **looks) for table in tables]
        scores = paper_scores(seen, options.alpha, options.sigma)
    elif len(candidates) > 1:
        seen = sampled_sums(q, k, geometry, tables, key_bias, rest)
        scores = mass_kept_scores(seen, options.density)
    total = scores if previous_scores is None else scores + previous_scores.to(scores.device)
    per_group = total.unflatten(0, (kv_heads, heads // kv_heads)).mean(1)
    choice = first_best(per_group).repeat_interleave(heads // kv_heads)
    rows = torch.stack(tables)[choice]
    tail = None
    if v is not None and options.pool is not None:
        more = {"density": options.density, "pool": options.pool, "key_bias": key_bias}
        tail = observe_tail(q, k, v, geometry, rows, **more, **rest)
    # Without values only the masses can tell a bias.
    pool = options.pool if options.pooled_mass or v is None else None
    if pool is None and masses is not None:
        full = BlockStatistics(torch.stack([masses[order][head] for head, order in enumerate(choice.tolist())]))
    elif pool is None and tail is not None and not options.every_row:
        full = BlockStatistics(tail.mass)
    else:
        full = block_statistics(q, k, lse(), geometry, rows, pool=pool, **rest)
    falloff = observe_falloff(q, k, layout, scale=scale, key_bias=key_bias)
    errors = logit_errors(q, k, geometry, rows, scale=scale)
    return Observation(candidates, scores, choice, full.mass, falloff, full.pooled, tail, errors)


def sampled_sums(q, k, g: Geometry, tables: list[torch.Tensor], key_bias, rest: dict) -> list[BlockStatistics]:
    """Block sums under every order, estimated from ORDER_ROWS rows of some query blocks."""
    sample = order_sample(g.q_blocks, q.device)
    positions = block_positions(g, sample, ORDER_ROWS)[0].flatten()
    tokens = torch.cat([table[positions] for table in tables]).long() + g.prefix
    lse = torch.empty(q.shape[:3], device=q.device)
    lse[:, :, tokens] = row_logsumexp(q[:, :, tokens], k, key_bias=key_bias, **rest)
    looks = {"q_blocks": sample, "rows_per_block": ORDER_ROWS, **rest}
    return [block_statistics(q, k, lse, g, table.expand(q.shape[1], -1), **looks) for table in tables]


def masses_by_membership(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, g: Geometry, tables: list[torch.Tensor], scale: float | None
) -> list[torch.Tensor]:
    """Block sums under every order from one product Q K^T: float32 `[Hq, q_blocks, k_blocks]` per order.

    Multiplies the weights by a table of 0 and 1 that says which block a key belongs to; cheap while blocks are few.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    one_hot = torch.nn.functional.one_hot
    # The inverse of a permutation: where each grid token stands in the order.
    positions = [table.long().argsort() for table in tables]
    belongs = torch.cat([one_hot(p // g.block_k, g.k_blocks) for p in positions], 1).float()
    rows_of = [one_hot(p // g.block_q, g.q_blocks).float().T for p in positions]
    grid = slice(g.prefix, g.prefix + g.grid_tokens)
    batch, heads = q.shape[:2]
    sums = [torch.zeros(heads, g.q_blocks, g.k_blocks, device=q.device) for _ in tables]
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // (heads // k.shape[1]), grid].float()
            weights = (q[b, h, grid].float() * scale @ keys.T - lse[b, h, grid, None]).exp_()
            per_row = (weights @ belongs / batch).split(g.k_blocks, 1)
            for total, member, rows in zip(sums, rows_of, per_row, strict=True):
                total[h] += member @ rows
    return sums


def first_best(scores: torch.Tensor, tie: float = 1e-4) -> torch.Tensor:
    """Index of the first score within `tie` of the best, per row of `[H, n]`: the original order wins ties."""
    return (scores >= scores.amax(1, keepdim=True) - tie).float().argmax(1)
