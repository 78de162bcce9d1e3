"""Calibration: collect what passes by, then make a plan of it.

One calibrator serves one model and grid. A run in passing feeds it the last dense step; *PARO Calibrate* feeds it
chosen steps of several prompts. Sums live on the CPU, so the GPU holds one site at a time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from .orders import AXIS_ORDERS
from .plan import ModelIdentity, Plan, PlanError, Site, SitePlan
from .recipes import MaskOptions, query_block
from .selection import mass_kept, per_head_masks, shared_masks, tail_bias
from .statistics import Observation, StatisticsOptions, observe
from .tokens import TokenLayout

# Larger block tables are kept in half precision: 40 sites of a 720p model would not fit the memory otherwise.
FULL_PRECISION_ELEMENTS = 1 << 22


@dataclass
class _SiteSums:
    """Sums over the observations of one site; `weight` counts, per head, those that the mass of its choice rests on."""

    candidates: tuple[str, ...]
    scores: torch.Tensor
    choice: torch.Tensor
    mass: torch.Tensor
    pooled: torch.Tensor | None
    weight: torch.Tensor

    def add(self, seen: Observation) -> None:
        """Fold in one more observation; heads whose order changed start anew with it."""
        same = seen.choice == self.choice
        keep = same[:, None, None]
        self.scores += seen.scores
        self.choice = seen.choice
        self.mass = _add(self.mass, seen.mass, keep)
        if self.pooled is not None:
            self.pooled = _add(self.pooled, seen.pooled, keep)
        self.weight = self.weight.where(same, 0) + 1


def _add(total: torch.Tensor, more: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return (total.float().where(keep, 0) + more.float()).to(total.dtype)


def _stored(seen: Observation, block_q: int) -> Observation:
    """The observation on the CPU, its tables scaled so that evenly spread attention is 1: half precision's range."""
    dtype = torch.float32 if seen.mass.numel() <= FULL_PRECISION_ELEMENTS else torch.float16
    scale = seen.mass.shape[2] / block_q

    def store(table: torch.Tensor | None) -> torch.Tensor | None:
        return None if table is None else (table * scale).to(dtype).cpu()

    return Observation(seen.candidates, seen.scores.cpu(), seen.choice.cpu(), store(seen.mass), store(seen.pooled))


class Calibrator:
    """Collects observations of every site and turns them into a plan. Safe to feed from several threads."""

    def __init__(self, identity: ModelIdentity, options: MaskOptions) -> None:
        self.identity = identity
        self.options = options
        self.layout: TokenLayout | None = None
        self._sums: dict[Site, _SiteSums] = {}
        self._lock = threading.Lock()

    @property
    def observations(self) -> int:
        """Site observations so far."""
        return sum(int(s.weight.max()) for s in self._sums.values())

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(sorted(self._sums))

    def observe(
        self,
        site: Site,
        layout: TokenLayout,
        q: torch.Tensor,
        k: torch.Tensor,
        *,
        scale: float | None = None,
        key_bias: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        """Add one attention call: q `[B, Hq, L, D]`, k `[B, Hkv, L, D]`. Raises PlanError for another grid."""
        with self._lock:
            if self.layout is None:
                self.layout = layout
            previous = self._sums.get(site)
        if self.layout.grid != layout.grid:
            raise PlanError(f"calibration: began on the grid {self.layout.grid}, now sees {layout.grid}")
        options = StatisticsOptions(self.options.density, self.options.order, self.options.pool)
        block_q = query_block(layout.grid_tokens)
        seen = observe(
            q,
            k,
            layout,
            block_q,
            options,
            scale=scale,
            key_bias=key_bias,
            previous_scores=None if previous is None else previous.scores,
            backend=backend,
        )
        seen = _stored(seen, block_q)
        with self._lock:
            if site in self._sums:
                self._sums[site].add(seen)
            else:
                weight = torch.ones(seen.choice.shape[0], dtype=torch.long)
                self._sums[site] = _SiteSums(seen.candidates, seen.scores, seen.choice, seen.mass, seen.pooled, weight)

    def plan(self, made: dict) -> Plan:
        """Orders, masks and biases from everything observed. Raises PlanError when nothing was."""
        if not self._sums:
            raise PlanError("calibration: no self-attention call was observed")
        sites = self.sites
        sums = [self._sums[site] for site in sites]
        masses = [s.mass.float() / s.weight[:, None, None] for s in sums]
        choose = shared_masks if self.options.budget == "shared" else per_head_masks
        masks = choose(masses, self.options.density)
        entries = {}
        for site, s, mass, mask in zip(sites, sums, masses, masks, strict=True):
            orders = [s.candidates[i] for i in s.choice.tolist()]
            # Mass and pooled mass carry the same scale and weight, so the bias needs neither undone.
            bias = None if s.pooled is None else tail_bias(s.mass, s.pooled, mask)
            entries[site] = SitePlan.create(orders, mask, bias, mass_kept(mass, mask))
        layout = self.layout
        made = {"observations": self.observations, "candidates": list(AXIS_ORDERS), **made}
        return Plan(
            self.identity,
            layout,
            query_block(layout.grid_tokens),
            entries,
            self.options.pool or 64,
            self.options.as_dict(),
            made,
        )
