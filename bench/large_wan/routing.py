"""Masks that are made while a run goes on, in place of its plan's: what else a method could look at.

Each head keeps as many blocks as the run's own plan gives it in that step, in the plan's order, so that only where the
masks come from differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ...kernels.core.block_mask import pack_bits
from ...kernels.core.inputs import AttentionInputs, ScoreInputs
from ...kernels.core.layout import BLOCK_K, Geometry
from ...kernels.core.pattern import SparsePattern
from ...kernels.statistics.api import block_statistics, row_logsumexp
from ...kernels.statistics.mean_queries import mean_query_masses
from ...paro_runtime.attention.patterns import sent
from ...paro_runtime.calibration.mask_choice import masks_of_counts
from ...paro_runtime.calibration.tail_fit import observe_tail
from ...paro_runtime.plan.plan import Site, SitePlan
from ...paro_runtime.run.evaluation import Evaluation

# At which `true_error` sets the factor of blocks whose pools stand for them.
ERROR_DENSITY = 0.2

# What blocks are worth, `[H, q_blocks, k_blocks]`, of q, k and v `[B, H, L, D]` under the tables int `[H, N]`.
Worth = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Geometry, torch.Tensor], torch.Tensor]


def _group_means(x: torch.Tensor, tables: torch.Tensor, size: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means float32 `[H, groups, D]` of every `size` rows of x `[1, H, N, D]` in each head's order, and how many rows
    each has, float32 `[groups]`: the last ones may have fewer, or none."""
    tokens = x.shape[2]
    rows = x[0].gather(1, tables.long()[..., None].expand(-1, -1, x.shape[3])).float()
    rows = torch.nn.functional.pad(rows, (0, 0, 0, groups * size - tokens))
    counts = (tokens - size * torch.arange(groups, device=x.device)).clamp(0, size).float()
    return rows.unflatten(1, (groups, size)).sum(2) / counts.clamp_min(1)[:, None], counts


def pooled_scores(size: int) -> Worth:
    """Softmaxed scores of the means of `size` queries with the means of `size` keys, summed over each block: `size`
    divides 64. A plain PyTorch version of what block-sparse methods route by, for one sample and no context tokens."""

    def worth(q, k, v, g: Geometry, tables):
        if q.shape[0] != 1 or g.context_tokens:
            raise ValueError("pooled_scores: one sample without context tokens is expected")
        queries, weight = _group_means(q, tables, size, g.q_blocks * (g.block_q // size))
        keys, counts = _group_means(k, tables, size, g.k_blocks * (g.block_k // size))
        scores = queries @ keys.transpose(1, 2) * q.shape[3] ** -0.5 + counts.log()
        shares = scores.softmax(2) * weight[:, None]
        return shares.unflatten(2, (g.k_blocks, -1)).sum(3).unflatten(1, (g.q_blocks, -1)).sum(2)

    return worth


def mean_queries(parts: int) -> Worth:
    """So many mean queries of each block with every key, as the product does it."""

    def worth(q, k, v, g: Geometry, tables) -> torch.Tensor:
        return mean_query_masses(ScoreInputs(q, k), g, tables, parts=parts)

    return worth


def true_mass(q, k, v, g: Geometry, tables) -> torch.Tensor:
    """The attention itself, summed over blocks."""
    scores = ScoreInputs(q, k)
    return block_statistics(scores, row_logsumexp(scores), g, tables).mass


def true_error(q, k, v, g: Geometry, tables) -> torch.Tensor:
    """The squared output error that leaving a block to the tail costs, by 64 rows of each block of queries."""
    inputs = AttentionInputs(q, k, v, g, tables)
    return observe_tail(inputs, density=ERROR_DENSITY, pool=BLOCK_K, rows=64).error


def mask_by_worth(worth: torch.Tensor, entry: SitePlan, group: int) -> torch.Tensor:
    """Bool like worth `[H, q_blocks, k_blocks]`: of each head the best blocks, as many as its plan gives it in a group
    of steps."""
    counts = (entry.density[group : group + 1] * worth[0].numel()).round().long()
    return masks_of_counts(worth, sent(counts, worth.device))[0]


def without_masks(entry: SitePlan) -> SitePlan:
    """The same site as a plan has it whose runs measure their masks."""
    return replace(entry, packed=entry.packed.new_empty(entry.groups, 0))


class Router:
    """Gives a session other masks before its sparse calls; of one run. `density` is the mean of what was kept.

    once_per_group: only in the first step of each group of sparse steps, else in every one. Steps before the session
    has a plan are left alone.
    """

    def __init__(self, worth: Worth, once_per_group: bool = False) -> None:
        self._worth, self._once = worth, once_per_group
        self._routed: dict[Site, tuple[int, torch.Tensor]] = {}
        self._kept: list[torch.Tensor] = []

    @property
    def density(self) -> float | None:
        """Kept blocks / all blocks, mean over sparse calls; None before the first."""
        return torch.stack(self._kept).mean().item() if self._kept else None

    def __call__(self, evaluation: Evaluation, site: Site, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Before a call. RuntimeError where there is no room to keep the pattern for it."""
        session, layout, step = evaluation.session, evaluation.layout, evaluation.step
        plan = session._grids[layout.grid].plan
        if plan is None or session.schedule.is_dense_step(step):
            return
        group = session.schedule.group(step, plan.groups)
        if self._once and site in self._routed and self._routed[site][0] == group:
            self._kept.append(self._routed[site][1])
            return
        entry = plan.sites[site]

        def measure(pattern: SparsePattern) -> torch.Tensor:
            worth = self._worth(q, k, v, pattern.geometry, pattern.tables_of_heads(q.shape[1]))
            mask = mask_by_worth(worth, entry, group)
            self._routed[site] = group, mask.float().mean()
            self._kept.append(self._routed[site][1])
            return pack_bits(mask)

        def refused(pattern: SparsePattern) -> torch.Tensor:
            raise RuntimeError(f"{site.name}: no room to keep a pattern, so other masks cannot be given to the session")

        where = (
            site,
            replace(plan, sites={**plan.sites, site: without_masks(entry)}),
            group,
            layout,
            k.shape[1],
            q.device,
        )
        session.patterns.drop(site, layout)
        session.patterns.get(*where, measure)
        session.patterns.get(*where, refused)
