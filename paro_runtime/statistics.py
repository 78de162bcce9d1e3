"""From one site's queries and keys to block statistics: which order suits each head, and what its blocks hold.

Streaming passes over Q K^T: the log-sum-exp of every row; block sums of some query blocks under every candidate order,
to choose; block sums of all query blocks under the chosen orders, for the mask; the falloff with distance from a few
hundred rows; and, where the values are at hand, the tail's errors on a few rows of every block. With a quarter of the
query blocks for ten orders that is 1 + 10/4 + 1 products Q K^T and a quarter of a dense attention, together two and a
half dense attentions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.api import block_statistics, row_logsumexp
from ..kernels.problem import Geometry
from ..kernels.statistics_reference import BlockStatistics
from .falloff import observe_falloff
from .orders import ORIGINAL, candidate_orders, order_table, tiled_orders
from .selection import mass_kept_scores, paper_scores
from .tail import TailObservation, observe_tail
from .tokens import TokenLayout

# Query blocks looked at when choosing an order: all of them up to this count, then this share.
ORDER_BLOCKS_AT_LEAST = 16
ORDER_BLOCKS_SHARE = 0.25


# Up to this many grid tokens a CPU counts block sums under all orders in one go; see `masses_by_membership`.
MEMBERSHIP_TOKENS = 4096


@dataclass(frozen=True)
class StatisticsOptions:
    """How sites are observed.

    density: at which orders are compared. order: `mass`, `paper` or `original`. tiles: offer tiled orders to `mass`.
    pool: tokens per pooled key, None without a tail. pooled_mass: also measure the mass of pooled keys, for a bias that
    only makes the total mass right. alpha, sigma: of the paper's metric.
    """

    density: float
    order: str = "mass"
    pool: int | None = 64
    tiles: bool = True
    pooled_mass: bool = False
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
    mass    float32 [H, q_blocks, k_blocks]: attention in each block.
    falloff float32 [H, bins]: mean weight of a key by its distance, see `falloff.observe_falloff`.
    pooled  the same as mass with pooled keys, or None unless asked for.
    tail    errors of the tail, or None without a tail or without values.
    """

    candidates: tuple[str, ...]
    scores: torch.Tensor
    choice: torch.Tensor
    mass: torch.Tensor
    falloff: torch.Tensor
    pooled: torch.Tensor | None = None
    tail: TailObservation | None = None


def geometry_of(layout: TokenLayout, block_q: int) -> Geometry:
    """The kernels' view of a layout."""
    return Geometry(layout.prefix, layout.grid, layout.suffix, block_q)


def order_sample(q_blocks: int, device: torch.device) -> torch.Tensor:
    """Evenly spread query blocks for choosing the order, int64, rising."""
    count = min(q_blocks, max(ORDER_BLOCKS_AT_LEAST, round(q_blocks * ORDER_BLOCKS_SHARE)))
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
    tables = [order_table(name, layout.grid).to(q.device) for name in candidates]
    lse = row_logsumexp(q, k, scale=scale, key_bias=key_bias, backend=backend)
    scores = torch.zeros(heads, len(candidates), device=q.device)
    masses = None
    if q.device.type == "cpu" and layout.grid_tokens <= MEMBERSHIP_TOKENS and options.order != "paper":
        masses = masses_by_membership(q, k, lse, geometry, tables, scale)
        scores = mass_kept_scores([BlockStatistics(mass) for mass in masses], options.density)
    elif len(candidates) > 1:
        sample = order_sample(geometry.q_blocks, q.device)
        epsilon = 1 / geometry.grid_tokens if options.order == "paper" else None
        seen = [
            block_statistics(
                q,
                k,
                lse,
                geometry,
                table.expand(heads, -1),
                q_blocks=sample,
                scale=scale,
                epsilon=epsilon,
                backend=backend,
            )
            for table in tables
        ]
        scores = (
            paper_scores(seen, options.alpha, options.sigma) if epsilon else mass_kept_scores(seen, options.density)
        )
    total = scores if previous_scores is None else scores + previous_scores.to(scores.device)
    per_group = total.unflatten(0, (kv_heads, heads // kv_heads)).mean(1)
    choice = first_best(per_group).repeat_interleave(heads // kv_heads)
    rows = torch.stack(tables)[choice]
    # Without values only the masses can tell a bias.
    pool = options.pool if options.pooled_mass or v is None else None
    if masses is not None and pool is None:
        full = BlockStatistics(torch.stack([masses[order][head] for head, order in enumerate(choice.tolist())]))
    else:
        full = block_statistics(q, k, lse, geometry, rows, scale=scale, pool=pool, backend=backend)
    tail = None
    if v is not None and options.pool is not None:
        tail = observe_tail(
            q, k, v, geometry, rows, density=options.density, pool=options.pool, scale=scale, key_bias=key_bias
        )
    falloff = observe_falloff(q, k, layout, scale=scale, key_bias=key_bias)
    return Observation(candidates, scores, choice, full.mass, falloff, full.pooled, tail)


def masses_by_membership(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, g: Geometry, tables: list[torch.Tensor], scale: float | None
) -> list[torch.Tensor]:
    """Block sums under every order from one product Q K^T: float32 `[Hq, q_blocks, k_blocks]` per order.

    Multiplies the weights by a table of 0 and 1 that says which block a key belongs to; cheap while blocks are few.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    positions = [torch.empty_like(t, dtype=torch.long).scatter_(0, t.long(), torch.arange(t.numel())) for t in tables]
    belongs = torch.cat([torch.nn.functional.one_hot(p // g.block_k, g.k_blocks) for p in positions], 1).float()
    grid = slice(g.prefix, g.prefix + g.grid_tokens)
    batch, heads = q.shape[:2]
    sums = [torch.zeros(heads, g.q_blocks, g.k_blocks) for _ in tables]
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // (heads // k.shape[1]), grid].float()
            weights = (q[b, h, grid].float() * scale @ keys.T - lse[b, h, grid, None]).exp_()
            per_row = (weights @ belongs / batch).split(g.k_blocks, 1)
            for total, position, rows in zip(sums, positions, per_row, strict=True):
                total[h].index_add_(0, position // g.block_q, rows)
    return sums


def first_best(scores: torch.Tensor, tie: float = 1e-4) -> torch.Tensor:
    """Index of the first score within `tie` of the best, per row of `[H, n]`: the original order wins ties."""
    return (scores >= scores.amax(1, keepdim=True) - tie).float().argmax(1)
