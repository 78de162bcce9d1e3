"""What the texts about a run need beyond the figures that programs get (`Report.as_dict`)."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..config.recipes import raised_density
from .sentences import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..run.grid_run import GridRun
    from ..run.policy import Policy
    from ..run.run_log import RunLog
    from ..run.schedule import Schedule


@dataclass(frozen=True)
class Timing:
    """Median seconds of so many steps. first: the only one there is was the run's first, which may load things."""

    seconds: float
    steps: int
    first: bool = False


@dataclass(frozen=True)
class Facts:
    """steps: those that happened. scheduled: all were dense because the schedule says so. part: which steps of a
    longer schedule are, if it is one. calibrating: PARO Calibrate's run. timing: of steps that can be compared.
    groups: (density, steps) of each group of sparse steps that happened. raised_from: the preset's density, where a
    small grid keeps more (`recipes.raised_density`). others: grids beside the report's, in words.
    """

    steps: int = 0
    sparse_steps: int = 0
    scheduled: bool = False
    part: str = ""
    calibrating: bool = False
    timing: dict[str, Timing] = field(default_factory=dict)
    groups: tuple[tuple[float, int], ...] = ()
    raised_from: float | None = None
    others: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        policy: Policy,
        schedule: Schedule,
        log: RunLog,
        grids: Sequence[GridRun],
        grid: GridRun | None,
        *,
        calibrating: bool,
    ) -> Facts:
        """Of a run that is over, about one of the grids; the others are only named."""
        clock = log.clock
        scheduled = 0 < clock.happened == clock.dense <= schedule.dense_steps and clock.happened >= schedule.steps
        part = ""
        if schedule.whole > schedule.steps:
            whole = {"dense": schedule.dense_whole, "steps": schedule.whole}
            part = say("the first {dense} of about {steps} are", **whole)
        others = sorted((one for one in grids if one is not grid), key=lambda one: one.layout.grid)
        return cls(
            steps=clock.happened,
            sparse_steps=len(clock.sparse),
            scheduled=scheduled,
            part=part,
            calibrating=calibrating,
            timing={kind: _timing(kind, found) for kind, found in clock.compared.items()},
            groups=_groups(schedule, clock.sparse, grid),
            raised_from=_raised_from(policy, grid),
            others=tuple(one.layout.describe() for one in others),
        )

    @property
    def density(self) -> float | None:
        """Share of the blocks kept, mean over the sparse steps that happened; None where it is not known."""
        steps = sum(count for _, count in self.groups)
        return sum(density * count for density, count in self.groups) / steps if steps else None

    @property
    def gain(self) -> float | None:
        """How much faster a sparse step was than a dense one, or None when there was not one of each."""
        if not self.timing.keys() >= {"dense", "sparse"}:
            return None
        return self.timing["dense"].seconds / self.timing["sparse"].seconds


def _timing(kind: str, found: list[tuple[int, float]]) -> Timing:
    """The first step of a run may load weights and choose kernels: as a dense one it does not count beside others."""
    later = [seconds for step, seconds in found if step > 0 or kind != "dense"]
    seconds = later or [seconds for _, seconds in found]
    return Timing(statistics.median(seconds), len(seconds), first=not later)


def _raised_from(policy: Policy, grid: GridRun | None) -> float | None:
    """None where the user gave the plan or the density."""
    if grid is None or policy.plan is not None:
        return None
    raised = raised_density(policy.settings, policy.recipe, grid.layout.grid_tokens)
    return None if raised is None else policy.recipe.densities[policy.settings.preset]


def _groups(schedule: Schedule, sparse: list[int], grid: GridRun | None) -> tuple[tuple[float, int], ...]:
    plan = grid.plan if grid is not None else None
    if plan is None:
        return ()
    densities = plan.densities
    steps = Counter(schedule.group(step, plan.groups) for step in sparse)
    return tuple((densities[group], count) for group, count in sorted(steps.items()))
