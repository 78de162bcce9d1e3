"""Which sampling steps and which blocks keep everything."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .settings import in_blocks, parse_blocks


def step_index(sigmas: Sequence[float], sigma: float) -> int:
    """The step that an evaluation at `sigma` belongs to: the last i with sigmas[i] >= sigma (sigmas fall).

    Multi-stage samplers (heun, dpmpp_sde) also evaluate between two sigmas; such an evaluation belongs to the step it
    is part of. Half precision may move a sigma a little, hence the tolerance.
    """
    index = 0
    for i, value in enumerate(sigmas[:-1] if len(sigmas) > 1 else sigmas):
        if value * (1 + 1e-4) + 1e-6 >= sigma:
            index = i
    return index


# A run's sparse steps fall into so many groups, and the first keeps FALL times as many blocks as the last: what early
# steps get wrong every later one builds on.
GROUPS = 3
FALL = 2.0
# Where no step is dense there is more to be got right early.
STEEP_FALL = 4.0


def falling_densities(density: float, fall: float = FALL) -> tuple[float, ...]:
    """Densities of the GROUPS groups of sparse steps: they fall by equal factors, and their mean is `density`.

    A group that would need more than every block keeps every block, and the others share what is left.
    """
    weights = [fall ** (-group / (GROUPS - 1)) for group in range(GROUPS)]
    for full in range(GROUPS):
        rest = weights[full:]
        unit = (density * GROUPS - full) / sum(rest)
        if unit * rest[0] <= 1:
            return (1.0,) * full + tuple(unit * weight for weight in rest)
    return (1.0,) * GROUPS


@dataclass(frozen=True)
class Schedule:
    """Dense steps are the first ones; dense blocks are parsed from the user's text."""

    steps: int
    dense_steps: int
    dense_blocks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def create(cls, steps: int, dense_steps: int, dense_blocks: str) -> Schedule:
        """`dense_steps` is cut to the number of steps there are."""
        return cls(steps, min(dense_steps, steps), parse_blocks(dense_blocks))

    def is_dense_step(self, step: int) -> bool:
        return step < self.dense_steps

    def group(self, step: int, groups: int) -> int:
        """Which of `groups` equal stretches of the sparse steps the middle of a sparse step lies in.

        Where the steps do not divide evenly, first and last group have the same number: the mean density stays.
        """
        sparse = self.steps - self.dense_steps
        return max(0, (2 * (step - self.dense_steps) + 1) * groups // (2 * sparse)) if sparse else 0

    def is_dense_block(self, index: int, total: int | None) -> bool:
        return in_blocks(self.dense_blocks, index, total)


def default_dense_steps(steps: int, fraction: float) -> int:
    """Steps kept dense when the user leaves it open: a share of the schedule, at least one.

    Few-step schedules (4 to 8 steps) cannot afford a percentage, so rounding is to the nearest whole step.
    """
    return max(1, math.floor(steps * fraction + 0.5))


@dataclass
class StepClock:
    """Wall-clock seconds of each step by kind. The host waits for the device between steps, so they add up."""

    step: int = -1
    kind: str = ""
    began: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def next(self, step: int, kind: str) -> None:
        """A step begins, and the one before it has ended."""
        now = time.perf_counter()
        if self.kind:
            self.seconds.setdefault(self.kind, []).append(now - self.began)
        self.step, self.kind, self.began = step, kind, now

    def medians(self) -> dict[str, float]:
        """Median seconds per step of each kind."""
        return {kind: statistics.median(values) for kind, values in self.seconds.items()}
