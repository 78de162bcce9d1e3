"""From what was observed of every site to a plan's sites: orders, masks, biases, and what goes with them.

Short sites are planned in launches rather than in work: what is a few numbers a head is worked out for all sites
together, and nothing but masks is brought to the CPU one site at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ...kernels.core.block_mask import pack_bits
from ...kernels.core.layout import TokenLayout, geometry_of
from ...kernels.statistics.logit_errors import CASES
from ..plan.options import MaskOptions, query_block
from ..plan.plan import Site, SitePlan
from .accumulator import SiteSums
from .mask_choice import PerHeadBudget, SharedBudget, density_for, masks_by, mass_kept
from .options import Method
from .outlier_rotation import root_means, rotates
from .tables import Worth
from .tail_fit import bias_at


@dataclass
class _Masks:
    """What a site's masks come to, of each group of steps: packed uint8 `[groups, bytes]` on the CPU; density and kept
    float32 `[groups, H]` where they were made."""

    packed: torch.Tensor
    density: torch.Tensor
    kept: torch.Tensor


class Planner:
    """One plan in the making."""

    def __init__(
        self,
        layout: TokenLayout,
        options: MaskOptions,
        method: Method,
        sums: dict[Site, SiteSums],
        group: int | None = None,
    ) -> None:
        """sums: of every observation, by site, in the plan's order. group: of steps, the only one that the plan is for,
        and has masks of. With a tail, sites without curves have a bias of zero, until a run measures it."""
        self.layout, self.options, self.method = layout, options, method
        self.sites = tuple(sums)
        self._sums = list(sums.values())
        self._group = group
        measured = [n for n, s in enumerate(self._sums) if s.logit_errors is not None]
        errors = root_means([(self._sums[n].logit_errors, self._sums[n].weight) for n in measured])
        self._errors = dict(zip(measured, errors, strict=True))
        # Sites whose bias follows from curves.
        self._of_curves = [n for n, s in enumerate(self._sums) if options.pool is not None and s.curves is not None]

    @property
    def by_mass(self) -> bool:
        """Whether blocks of any site are kept by their mass."""
        return any(map(self._by_mass, self._sums))

    def logit_errors(self) -> dict[str, float]:
        """Relative error that INT8 makes in the attention weights, by how it quantises: worst site."""
        found = zip(*self._errors.values(), strict=True)
        return {name: round(max(values), 5) for name, values in zip(CASES, found, strict=False)}

    def entries(self, device: torch.device) -> dict[Site, SitePlan]:
        """Every site's part of the plan, worked out on `device`, or on the CPU as soon as that has no more room."""
        try:
            budget = self._budget(device)
        except torch.OutOfMemoryError:
            device = torch.device("cpu")
            budget = self._budget(device)
        try:
            small = self._small(device)
        except torch.OutOfMemoryError:
            device = torch.device("cpu")
            small = self._small(device)
        made = []
        for number in range(len(self.sites)):
            try:
                made.append(self._masks(number, budget, device))
            except torch.OutOfMemoryError:
                device = torch.device("cpu")
                made.append(self._masks(number, budget, device))
        return self._joined(made, *small)

    def _budget(self, device: torch.device) -> SharedBudget | PerHeadBudget:
        budget = SharedBudget if self.options.budget == "shared" else PerHeadBudget
        densities = self.options.densities(self._density(budget, device))
        if self._group is not None:
            densities = (densities[min(self._group, len(densities) - 1)],)
        return budget([self._worth(s) for s in self._sums], densities, device)

    def _masks(self, number: int, budget: SharedBudget | PerHeadBudget, device: torch.device) -> _Masks:
        its, masks = self._sums[number], budget.masks(number, device)
        density = torch.stack([mask.float().mean((1, 2)) for mask in masks])
        mass = its.mass.to(device).float()
        kept = torch.stack([mass_kept(mass, its.mask_of_mass(mask)) for mask in masks])
        if self.method.routes(self.layout):
            packed = torch.empty(len(masks), 0, dtype=torch.uint8)
        else:
            packed = torch.stack([pack_bits(mask) for mask in masks])
        return _Masks(packed.cpu(), density, kept)

    def _small(self, device: torch.device) -> tuple[list[str], torch.Tensor | None]:
        """Of all heads of all sites their orders; the curves of those sites whose bias comes from curves alone, on the
        device."""
        sums = self._sums
        choices = torch.cat([s.choice.to(device) for s in sums]).tolist()
        names = [s.candidates for s in sums for _ in range(s.choice.numel())]
        orders = [its[choice] for its, choice in zip(names, choices, strict=True)]
        curves = [sums[number].curves.to(device) for number in self._of_curves]
        return orders, torch.cat(curves) if curves else None

    def _joined(self, made: list[_Masks], orders: list[str], curves) -> dict[Site, SitePlan]:
        heads = [each.density.shape[1] for each in made]
        g = geometry_of(self.layout, query_block(self.layout.grid_tokens))
        device = made[0].density.device  # a GPU if there was room at all
        biases = {}
        if self.options.pool is not None:
            biases = {n: torch.zeros_like(each.density, device="cpu") for n, each in enumerate(made)}
        if curves is not None:
            its = torch.cat([made[n].density.to(device) for n in self._of_curves], 1)
            found = bias_at(curves.to(device), its).cpu().split([heads[n] for n in self._of_curves], 1)
            biases |= zip(self._of_curves, found, strict=True)
        density = torch.cat([each.density.to(device) for each in made], 1).cpu().split(heads, 1)
        kept = torch.cat([each.kept.to(device) for each in made], 1).cpu().split(heads, 1)
        entries, first = {}, 0
        for number, (site, each) in enumerate(zip(self.sites, made, strict=True)):
            some, first = slice(first, first + heads[number]), first + heads[number]
            bias, errors = biases.get(number), self._errors.get(number)
            entries[site] = SitePlan(
                tuple(orders[some]),
                each.packed,
                (heads[number], g.q_blocks, g.k_blocks),
                # Copies: a slice would hold every site's numbers as long as one of them lives.
                None if bias is None else bias.clone(),
                density[number].clone(),
                kept[number].clone(),
                errors is not None and rotates(errors),
            )
        return entries

    def _density(self, budget, device: torch.device) -> float:
        """The density that was asked for, or what the share of the attention that was asked for takes."""
        density, target = self.options.density, self.options.mass_target
        if not target:
            return density

        masses = [Worth(s.mass) for s in self._sums]
        judged = [s.mask_of_mass(self._worth(s)) for s in self._sums]
        choose = partial(masks_by, budget, device=device)
        return density_for(masses, judged, target, density, choose, self.options.densities, device)

    def _by_mass(self, s: SiteSums) -> bool:
        method = self.method
        return s.error is None or method.by_mass_alone(self.layout) or method.steep(self.options)

    def _worth(self, s: SiteSums) -> Worth:
        """What a block is worth, `[H, q_blocks, k_blocks]`, comparable across heads and sites."""
        if self._by_mass(s):
            return Worth(s.mass, s.weight)
        return Worth(s.error, s.energy.clamp_min(1e-20))
