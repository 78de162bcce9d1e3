"""From one site's queries and keys to block statistics: which order suits each head, and what its blocks hold.

No pass looks at more rows than it must. To choose, some rows under every candidate order: on small grids the same rows
for all orders, all of them on the smallest; on large ones some rows of some query blocks of each. Then, under the
chosen orders and where the values are at hand, the tail's errors on a few rows of every block, which tell the block
sums too. Without values, or for masks by mass, block sums come from every row of small grids, and from a few mean
queries of every block of large ones; where runs measure their masks themselves, of some blocks, which tell how many
blocks each head wants.
What is looked at shrinks with the size of the grid: up to three dense attentions on the smallest, a third of one on
75,600 tokens (`tests/unit/calibration/test_cost.py`). Nothing waits for the device on large grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...kernels.core.inputs import ScoreInputs
from ...kernels.core.layout import Geometry, TokenLayout, geometry_of
from ...kernels.core.sampling import ROWS_PER_BLOCK
from ...kernels.statistics.api import block_statistics, row_logsumexp
from ...kernels.statistics.logit_errors import logit_errors
from ...kernels.statistics.mean_queries import mean_query_masses
from ..plan.orders import tables_on
from .options import StatisticsOptions, is_large
from .order_choice import LEAST_LEAD, first_best, order_scores
from .tail_fit import TailObservation, bias_curves, observe_tail

# On large grids: rows of each block for the tail's errors.
LARGE_TAIL_ROWS = 4
# Query blocks, evenly spread, that tell how many blocks a head wants.
BUDGET_BLOCKS = 48


@dataclass(frozen=True)
class Observation:
    """What one attention call told. H = query heads.

    scores  float32 [H, candidates], higher is better; the names are in `candidates`.
    choice  int64 [H]: index of the order under which the rest was taken.
    mass    float32 [H, q_blocks, k_blocks]: attention in each block, of all rows or estimated from the tail's or from
            mean queries; of those of `budget_blocks` only where the options say so.
    tail    errors of the tail, or None without a tail or without values.
    logit_errors float32 [H, 3]: what quantising does to the logits, see `kernels/statistics/logit_errors.py`.
    """

    candidates: tuple[str, ...]
    scores: torch.Tensor
    choice: torch.Tensor
    mass: torch.Tensor
    tail: TailObservation | None = None
    logit_errors: torch.Tensor | None = None


def observe(
    scores: ScoreInputs,
    layout: TokenLayout,
    block_q: int,
    options: StatisticsOptions,
    *,
    v: torch.Tensor | None = None,
    previous_scores: torch.Tensor | None = None,
    previous_choice: torch.Tensor | None = None,
    backend: str = "auto",
) -> Observation:
    """Statistics of one call, with its values `[B, Hkv, L, D]` where there are any.

    previous_scores `[Hq, candidates]` of earlier calls are added before choosing, so that the choice rests on all;
    previous_choice `[Hq]`: see `_chosen`.
    """
    geometry, device = geometry_of(layout, block_q), scores.q.device
    candidates = options.candidates(layout.grid)
    fit, masses = order_scores(scores, geometry, options, backend)
    total = fit if previous_scores is None else fit + previous_scores.to(device)
    choice = _chosen(total, scores.group, previous_choice)
    tables = tables_on(candidates, layout.grid, device)[choice]
    large = is_large(layout.grid_tokens)
    mass = tail = None
    if masses is not None:
        mass = torch.stack([masses[order][head] for head, order in enumerate(choice.tolist())])
    elif large and (options.by_mass or v is None or options.pool is None):
        seen = budget_blocks(geometry, device) if options.sampled else None
        mass = mean_query_masses(scores, geometry, tables, q_blocks=seen, backend=backend)
    if v is not None and options.pool is not None:
        inputs = scores.with_values(v, geometry, tables)
        pool, expansions = options.pool, options.expansions
        if large and options.by_mass and mass is not None:
            if options.curves:
                seen = torch.arange(geometry.q_blocks, device=device) if seen is None else seen
                curves = bias_curves(inputs, mass, seen, pool=pool, expansions=expansions, backend=backend)
                tail = TailObservation(curves)
        else:
            tail = observe_tail(
                inputs,
                density=options.density,
                pool=pool,
                expansions=expansions,
                rows=LARGE_TAIL_ROWS if large else ROWS_PER_BLOCK,
                curves=options.curves,
                backend=backend,
            )
    if mass is None and tail is not None and not options.by_mass:
        mass = tail.mass
    if mass is None:
        lse = row_logsumexp(scores, backend)
        mass = block_statistics(scores, lse, geometry, tables, backend=backend).mass
    return Observation(candidates, fit, choice, mass, tail, logit_errors(scores, geometry, tables))


def _chosen(total: torch.Tensor, group: int, previous: torch.Tensor | None) -> torch.Tensor:
    """The order of each head, int64 `[Hq]`, by scores `[Hq, candidates]`.

    A head leaves its previous one `[Hq]` only for one that is better by LEAST_LEAD: what was summed under the old one
    is lost with it. The `group` query heads that share a key head share its order: the keys are reordered once.
    """
    per_group = total.unflatten(0, (-1, group)).mean(1)
    choice = first_best(per_group)
    if previous is not None:
        present = previous.to(total.device).unflatten(0, (-1, group))[:, 0]
        its, best = per_group.gather(1, present[:, None])[:, 0], per_group.amax(1)
        choice = choice.where(best - its > LEAST_LEAD * best.abs(), present)
    return choice.repeat_interleave(group)


@lru_cache(maxsize=8)
def budget_blocks(g: Geometry, device: torch.device) -> torch.Tensor:
    """The query blocks that tell how many blocks a head wants: int64, rising, all of them whole."""
    whole = g.grid_tokens // g.block_q
    return torch.linspace(0, whole - 1, min(whole, BUDGET_BLOCKS)).round().long().to(device)
