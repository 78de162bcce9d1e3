"""From one site's queries and keys to block statistics: which order suits each head, and what its blocks hold.

Three streaming passes over Q K^T: the log-sum-exp of every row; block sums of some query blocks under every candidate
order, to choose; block sums of all query blocks under the chosen orders, for the mask and the tail. With a quarter of
the query blocks for six orders that is 1 + 6/4 + 1 products Q K^T, less than two dense attentions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.api import block_statistics, row_logsumexp
from ..kernels.problem import Geometry
from .orders import ORIGINAL, candidate_orders, order_table
from .selection import mass_kept_scores, paper_scores
from .tokens import TokenLayout

# Query blocks looked at when choosing an order: all of them up to this count, then this share.
ORDER_BLOCKS_AT_LEAST = 24
ORDER_BLOCKS_SHARE = 0.25


@dataclass(frozen=True)
class StatisticsOptions:
    """How sites are observed. density: at which the mass kept is compared; order: `mass`, `paper` or `original`."""

    density: float
    order: str = "mass"
    pool: int | None = 64
    alpha: float = 0.5


@dataclass(frozen=True)
class Observation:
    """What one attention call told. H = query heads.

    scores  float32 [H, candidates], higher is better; the names are in `candidates`.
    choice  int64 [H]: index of the order under which mass and pooled were taken.
    mass    float32 [H, q_blocks, k_blocks]; pooled likewise, or None without a tail.
    """

    candidates: tuple[str, ...]
    scores: torch.Tensor
    choice: torch.Tensor
    mass: torch.Tensor
    pooled: torch.Tensor | None


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
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    previous_scores: torch.Tensor | None = None,
    backend: str = "auto",
) -> Observation:
    """Statistics of one call; q `[B, Hq, L, D]`, k `[B, Hkv, L, D]`, key_bias `[B, L]`.

    previous_scores `[Hq, candidates]` of earlier calls are added before choosing, so that the choice rests on all.
    The query heads that share a key head share its order, since the keys are reordered once.
    """
    geometry = geometry_of(layout, block_q)
    candidates = (ORIGINAL,) if options.order == "original" else candidate_orders(layout.grid)
    heads, kv_heads = q.shape[1], k.shape[1]
    tables = [order_table(name, layout.grid).to(q.device) for name in candidates]
    lse = row_logsumexp(q, k, scale=scale, key_bias=key_bias, backend=backend)
    scores = torch.zeros(heads, len(candidates), device=q.device)
    if len(candidates) > 1:
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
        scores = paper_scores(seen, options.alpha) if epsilon else mass_kept_scores(seen, options.density)
    total = scores if previous_scores is None else scores + previous_scores.to(scores.device)
    per_group = total.unflatten(0, (kv_heads, heads // kv_heads)).mean(1)
    choice = first_best(per_group).repeat_interleave(heads // kv_heads)
    rows = torch.stack(tables)[choice]
    full = block_statistics(q, k, lse, geometry, rows, scale=scale, pool=options.pool, backend=backend)
    return Observation(candidates, scores, choice, full.mass, full.pooled)


def first_best(scores: torch.Tensor, tie: float = 1e-4) -> torch.Tensor:
    """Index of the first score within `tie` of the best, per row of `[H, n]`: the original order wins ties."""
    return (scores >= scores.amax(1, keepdim=True) - tie).float().argmax(1)
