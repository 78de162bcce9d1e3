"""Calibration: collect what passes by, then make a plan of it.

One calibrator serves one model and grid. A run in passing feeds it the last dense step, and nothing leaves the GPU
before the plan is made but tables that find no room there. *PARO Calibrate* feeds it chosen steps of several prompts
and keeps the sums in a folder, so that it can be stopped at any moment and resumed: those live on the CPU.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..kernels.kept_words import pack_bits
from ..kernels.problem import MOST_EXPANSIONS
from .falloff import pack_falloff
from .partial import PartialStore
from .plan import ModelIdentity, Plan, PlanError, Site, SitePlan
from .recipes import MaskOptions, query_block
from .rotation import CASES, root_mean, rotates
from .schedule import GROUPS, Schedule
from .selection import PerHeadBudget, SharedBudget, density_for, mass_kept, tail_bias
from .stability import Glimpse, Stability, compare, glimpse
from .statistics import SHARED_TOKENS, Observation, StatisticsOptions, observe
from .sums import Room, SiteSums, stored
from .tables import Worth, to_cpu
from .tail import bias_at
from .tokens import TokenLayout


@dataclass(frozen=True)
class Method:
    """How a plan follows from what was observed. The defaults are what measured best; the rest is for comparisons.

    criterion: blocks are kept by `error`, the squared output error, relative to the head's own output, that leaving
    them to the tail would cost, or by `mass`. `auto` is error, but mass where the first step, which begins with nothing
    but noise, counts most, since errors measured there mislead (docs/method.md): in plans made in passing from that
    step, and in those for runs without a dense step. Without a tail or without values it is always mass.
    bias: the tail's bias by least `error`, or so that the total `mass` is right.
    tiles: offer tiled orders. expansions: of the tail's pools; with a bias by mass they are plain means.
    alpha, sigma: of the paper's metric.
    time_groups: each group of sparse steps of this schedule has masks from its own steps, as in the paper; None takes
    all observations for all masks. What a resumed calibration had observed before counts for all groups.
    """

    criterion: str = "auto"
    bias: str = "error"
    tiles: bool = True
    expansions: int = MOST_EXPANSIONS
    alpha: float = 0.5
    sigma: float = 1.0
    time_groups: Schedule | None = None

    def in_passing(self, pure_noise: bool) -> Method:
        """This method for a plan that a run makes of one of its own steps; pure_noise: that step begins with noise."""
        return replace(self, criterion="mass") if pure_noise and self.criterion == "auto" else self

    @property
    def by_mass(self) -> bool:
        """Whether blocks are kept by their mass even where errors are known."""
        return self.criterion == "mass"


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
    ) -> None:
        """partial: folder that keeps the sums after every observation; what it holds already is taken up again.

        Raises PlanError when the folder belongs to another model, grid or options.
        """
        self.identity = identity
        self.options = options
        self.method = method or Method()
        self.layout: TokenLayout | None = None
        self.prompt = 0
        self._sums: dict[Site, SiteSums] = {}
        self._of_groups: dict[tuple[Site, int], SiteSums] = {}
        self._glimpses: dict[tuple[Site, int, int], Glimpse] = {}
        self._room = Room()
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
            options.pool is not None and method.bias == "mass",
            self._by_mass_alone(layout),
            method.alpha,
            method.sigma,
        )
        block_q = query_block(layout.grid_tokens)
        before = (None, None) if previous is None else (previous.scores, previous.choice)
        seen = observe(
            q,
            k,
            layout,
            block_q,
            wanted,
            v=v,
            scale=scale,
            key_bias=key_bias,
            previous_scores=before[0],
            previous_choice=before[1],
            backend=backend,
        )
        self._add(site, step, seen)

    def _add(self, site: Site, step: int, seen: Observation) -> None:
        look = glimpse(seen, self.options.compared_density)
        # Many observations are added up on the CPU, one or two of a run where they were made.
        fresh = stored(seen, not self._by_mass_alone(self.layout), coded=self._partial is None)
        if self._partial is not None:
            look, fresh = look.on_cpu(), fresh.on_cpu()
        with self._lock:
            label = (self.prompt, step)
            self._glimpses[(site, *label)] = look
            if site in self._sums:
                self._room.finish()
                self._sums[site].add(fresh)
            else:
                self._sums[site] = self._room.settled(fresh)
            sums = self._sums[site]
            sums.done.add(label)
            if self.method.time_groups is not None:
                key = (site, self.method.time_groups.group(step, GROUPS))
                if key in self._of_groups:
                    self._of_groups[key].add(fresh)
                else:
                    self._of_groups[key] = replace(fresh, done=set())
            if self._partial is not None:
                self._partial.write(site, sums, self.layout)

    def stability(self) -> Stability:
        """Agreement of orders and masks between steps of a prompt and between prompts, of what this object saw."""
        return compare(self._glimpses)

    def forget_partial(self) -> None:
        """Remove the folder of sums: the plan is saved."""
        if self._partial is not None:
            self._partial.remove()

    def plan(self, made: dict) -> Plan:
        """Orders, masks and biases from everything observed. Raises PlanError when nothing was."""
        if not self._sums:
            raise PlanError("calibration: no self-attention call was observed")
        self._room.finish()
        sites = self.sites
        sums = [self._sums[site] for site in sites]
        try:
            entries = self._entries(sites, sums, self._device)
        except torch.OutOfMemoryError:
            entries = self._entries(sites, sums, torch.device("cpu"))
        layout = self.layout
        made = {
            "observations": self.observations,
            "candidates": list(sums[0].candidates),
            "stability": self.stability().as_dict(),
            "int8_logit_error": self._logit_error(sums),
            "criterion": "mass" if any(map(self._by_mass, sums)) else "error",
            **made,
        }
        block_q, pool = query_block(layout.grid_tokens), self.options.pool or 64
        # A bias that makes the mass right was measured with plain means.
        expansions = self.method.expansions if all(map(self._bias_by_error, sums)) else 0
        return Plan(self.identity, layout, block_q, entries, pool, self.options.as_dict(), made, expansions)

    def _entries(self, sites: tuple[Site, ...], sums: list[SiteSums], device: torch.device) -> dict[Site, SitePlan]:
        """Masks, orders and biases, worked out on `device`: a GPU takes seconds where a CPU takes a minute."""
        budget = SharedBudget if self.options.budget == "shared" else PerHeadBudget
        densities = self.options.densities(self._density(sums, budget, device))
        if self.method.time_groups is None:
            of_groups = [sums] * len(densities)
            budgets = [budget([self._worth(s) for s in sums], densities, device)]
        else:
            densities *= GROUPS if len(densities) == 1 else 1
            of_groups = [[self._of_group(site, group) for site in sites] for group in range(GROUPS)]
            budgets = [
                budget([self._worth(s) for s in its], [density], device)
                for its, density in zip(of_groups, densities, strict=True)
            ]
        entries = {}
        for number, site in enumerate(sites):
            masks = [mask for each in budgets for mask in each.masks(number)]
            entries[site] = self._entry(sums[number], [its[number] for its in of_groups], masks)
        return entries

    def _entry(self, total: SiteSums, of_groups: list[SiteSums], masks: list[torch.Tensor]) -> SitePlan:
        """One site; of_groups: the sums that the mask of each group follows from."""
        device = masks[0].device
        orders = [total.candidates[i] for i in total.choice.tolist()]
        density = [mask.float().mean((1, 2)) for mask in masks]
        kept, mass, mass_of = [], None, None
        for s, mask in zip(of_groups, masks, strict=True):
            if s is not mass_of:
                mass_of, mass = s, s.mass.to(device).float()
            kept.append(mass_kept(mass, s.mask_of_mass(mask)))
        if all(s is total for s in of_groups) and self._bias_by_error(total) and self.options.pool is not None:
            biases = bias_at(total.curves.to(device), torch.stack(density)).unbind()
        else:
            biases = [self._bias(s, *its) for s, *its in zip(of_groups, masks, density, strict=True)]
        rotate = total.logit_errors is not None and rotates(total.logit_errors, total.weight)
        falloff = pack_falloff(total.falloff.to(device), total.received.to(device), orders, self.layout.grid)
        packed = [pack_bits(mask) for mask in masks]
        bias = None if biases[0] is None else biases
        return SitePlan.of_groups(orders, packed, masks[0].shape, density, bias, kept, to_cpu(falloff), rotate)

    def _density(self, sums: list[SiteSums], budget, device: torch.device) -> float:
        """The density that was asked for, or what the share of the attention that was asked for takes."""
        density, target = self.options.density, self.options.mass_target
        if not target:
            return density

        def choose(worths: list[torch.Tensor], its: float) -> list[torch.Tensor]:
            made = budget([Worth(worth) for worth in worths], [its], device)
            return [made.masks(site)[0] for site in range(len(worths))]

        judged = [s.mask_of_mass(self._worth(s)) for s in sums]
        return density_for(
            [Worth(s.mass) for s in sums], judged, target, density, choose, self.options.densities, device
        )

    def _logit_error(self, sums: list[SiteSums]) -> dict[str, float]:
        """Relative error that INT8 makes in the attention weights, by how it quantises: worst site."""
        found = [root_mean(s.logit_errors, s.weight) for s in sums if s.logit_errors is not None]
        return {name: round(max(values), 5) for name, values in zip(CASES, zip(*found, strict=True), strict=False)}

    def _of_group(self, site: Site, group: int) -> SiteSums:
        """What was observed in the steps of one group; where a head had another order there, or nothing was seen, what
        was observed in all of them."""
        total, own = self._sums[site], self._of_groups.get((site, group))
        if own is None:
            return total
        same, mine = own.choice == total.choice, own.tensors()
        parts = {
            name: mine.get(name, every).where(same.view(-1, *[1] * (every.dim() - 1)), every)
            for name, every in total.tensors().items()
        }
        return replace(total, **parts)

    @property
    def _steep(self) -> bool:
        """Whether masks serve from the first step on, which begins with nothing but noise."""
        return self.method.criterion == "auto" and self.options.density_schedule == "steep"

    def _by_mass_alone(self, layout: TokenLayout) -> bool:
        """Whether errors of single blocks are not even kept, so that masses of every block are."""
        return self.method.by_mass or (self._steep and layout.grid_tokens > SHARED_TOKENS)

    def _by_mass(self, s: SiteSums) -> bool:
        return s.error is None or self.method.by_mass or self._steep

    def _worth(self, s: SiteSums) -> Worth:
        """What a block is worth, `[H, q_blocks, k_blocks]`, comparable across heads and sites."""
        if self._by_mass(s):
            return Worth(s.mass, s.weight)
        return Worth(s.error, s.energy.clamp_min(1e-20))

    def _bias_by_error(self, s: SiteSums) -> bool:
        return s.curves is not None and self.method.bias == "error"

    def _bias(self, s: SiteSums, mask: torch.Tensor, density: torch.Tensor) -> torch.Tensor | None:
        """The tail's bias under a mask whose heads have these densities `[H]`, float32 `[H]`."""
        if self.options.pool is None:
            return None
        if self._bias_by_error(s):
            return bias_at(s.curves.to(density.device), density)
        return None if s.pooled is None else tail_bias(s.mass.to(mask.device), s.pooled.to(mask.device), mask)
