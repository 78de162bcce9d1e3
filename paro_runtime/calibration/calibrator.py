"""Calibration: collect what passes by, then make a plan of it.

One calibrator serves one model and grid. A run in passing feeds it the last dense step, and nothing leaves the GPU
before the plan is made. *PARO Calibrate* feeds it chosen steps of several prompts
and keeps the sums in a folder, so that it can be stopped at any moment and resumed: those live on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from ...kernels.core.inputs import ScoreInputs
from ...kernels.core.layout import TokenLayout
from ..plan.options import MaskOptions, query_block
from ..plan.plan import ModelIdentity, Plan, PlanError, Site
from .accumulator import SiteSums, stored
from .checkpoint import PartialStore
from .observe import Observation, observe
from .options import Method, StatisticsOptions
from .planning import Planner


class Calibrator:
    """Collects observations of every site and turns them into a plan. Safe to feed from several threads.

    prompt: number of the prompt that is being run; set it before each run.
    """

    def __init__(
        self,
        identity: ModelIdentity,
        options: MaskOptions,
        *,
        method: Method | None = None,
        partial: Path | None = None,
        bias_later: bool = False,
    ) -> None:
        """partial: folder that keeps the sums after every observation; what it holds already is taken up again.
        bias_later: the plan is for the run that is observed alone, which measures the tail's bias under its masks
        before it uses them: none is worked out here.

        Raises PlanError when the folder belongs to another model, grid or options.
        """
        self.identity = identity
        self.options = options
        self.method = method or Method()
        self.layout: TokenLayout | None = None
        self.prompt = 0
        self._sums: dict[Site, SiteSums] = {}
        self._bias_later = bias_later
        self._lock = threading.Lock()
        self._device = torch.device("cpu")  # where what was last observed was
        self._partial = PartialStore(partial, identity, options.as_dict()) if partial is not None else None
        self._resumed: set[tuple[Site, int, int]] = set()
        if self._partial is not None:
            self.layout, self._sums = self._partial.read()
            self._resumed = {(site, *label) for site, sums in self._sums.items() for label in sums.done}

    @property
    def observations(self) -> int:
        """Site observations so far."""
        return sum(len(sums.done) for sums in self._sums.values())

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(sorted(self._sums))

    def has(self, prompt: int, steps: set[int] | frozenset[int]) -> bool:
        """Whether these steps of a prompt were observed at every site: after a resumption such a prompt is skipped."""
        wanted = {(prompt, step) for step in steps}
        return bool(self._sums) and all(wanted <= sums.done for sums in self._sums.values())

    def observe(
        self,
        site: Site,
        layout: TokenLayout,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None = None,
        *,
        step: int = 0,
        scale: float | None = None,
        key_bias: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        """Add one attention call: q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]`. Raises PlanError for another grid."""
        if (site, self.prompt, step) in self._resumed:
            return
        with self._lock:
            if self.layout is None:
                self.layout = layout
            previous = self._sums.get(site)
            self._device = q.device
        if self.layout.grid != layout.grid:
            raise PlanError(f"calibration: began on the grid {self.layout.grid}, now sees {layout.grid}")
        method, options = self.method, self.options
        wanted = StatisticsOptions(
            options.compared_density,
            options.order,
            options.pool,
            method.expansions,
            method.tiles,
            by_mass=method.by_mass_alone(layout),
            curves=not self._bias_later,
            sampled=method.routes(layout),
        )
        block_q = query_block(layout.grid_tokens)
        before = (None, None) if previous is None else (previous.scores, previous.choice)
        scores = ScoreInputs(q, k, scale=scale, key_bias=key_bias)
        past = {"previous_scores": before[0], "previous_choice": before[1]}
        seen = observe(scores, layout, block_q, wanted, v=v, **past, backend=backend)
        self._add(site, step, seen)

    def _add(self, site: Site, step: int, seen: Observation) -> None:
        # Many observations are added up on the CPU, one or two of a run where they were made.
        fresh = stored(seen, not self.method.by_mass_alone(self.layout), compact=self._partial is None)
        if self._partial is not None:
            fresh = fresh.on_cpu()
        with self._lock:
            if site in self._sums:
                self._sums[site].add(fresh)
            else:
                self._sums[site] = fresh
            sums = self._sums[site]
            sums.done.add((self.prompt, step))
            if self._partial is not None:
                self._partial.write(site, sums, self.layout)

    def forget_partial(self) -> None:
        """Remove the folder of sums: the plan is saved."""
        if self._partial is not None:
            self._partial.remove()

    def plan(self, made: dict) -> Plan:
        """Orders, masks and biases from everything observed. Raises PlanError when nothing was."""
        if not self._sums:
            raise PlanError("calibration: no self-attention call was observed")
        planner = self._planner(self.sites)
        made = {
            "observations": self.observations,
            "candidates": list(self._sums[self.sites[0]].candidates),
            "int8_logit_error": planner.logit_errors(),
            **made,
        }
        return self._plan(planner, made)

    def plan_of(self, site: Site, group: int) -> Plan:
        """What one site that was observed would have in a group of sparse steps if it were the only site:
        nothing is shared with others. A plan of that group alone."""
        return self._plan(self._planner([site], group), {})

    def sums(self) -> dict[Site, SiteSums]:
        """What was observed so far, on the CPU."""
        with self._lock:
            return {site: sums.on_cpu() for site, sums in self._sums.items()}

    def with_sums(self, sums: dict[Site, SiteSums]) -> Calibrator:
        """Another one for the same purpose that has observed these, which are on the CPU."""
        other = Calibrator(self.identity, self.options, method=self.method, bias_later=self._bias_later)
        other.layout, other._sums = self.layout, sums
        return other

    def _planner(self, sites: Sequence[Site], group: int | None = None) -> Planner:
        with self._lock:
            sums = {site: self._sums[site] for site in sites}
        return Planner(self.layout, self.options, self.method, sums, group)

    def _plan(self, planner: Planner, made: dict) -> Plan:
        made = {"criterion": "mass" if planner.by_mass else "error", **made}
        rest = (self.options.pool or 64, self.options.as_dict(), made, self.method.expansions)
        entries = planner.entries(self._device)
        return Plan(self.identity, self.layout, query_block(self.layout.grid_tokens), entries, *rest)
