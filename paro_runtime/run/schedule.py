"""Which sampling steps and which blocks keep everything."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..config.settings import in_blocks, parse_blocks

# Half precision may move a sigma a little.
NEAR = 1e-4
# Samplers that add noise before a step (s_churn) multiply its sigma by at most this.
MOST_CHURN = 2**0.5
# A run that begins before this share of the model's time is over begins with nothing but noise.
BEGINNING = 1e-3
# More steps than is usual (50, and room for rounding): such an estimate says that the steps are not spread evenly.
MOST_STEPS = 55


class StepFinder:
    """Which step of a run an evaluation belongs to, by its sigma: the one whose two sigmas it lies between.

    Sigmas fall, rise (unsampling) or go up and down (restarts): of several such steps it is the next one, or, where a
    sampler went back, the first. Samplers with several evaluations a step (heun, dpmpp_sde) also evaluate between two
    sigmas, or at the next one, which counts as the next step. With s_churn each step is evaluated above its own sigma;
    by how much the first one tells.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self._sigmas = list(sigmas)
        self._churn = 0.0

    def find(self, sigma: float, current: int) -> int:
        """The step of an evaluation at `sigma` after one that belonged to step `current` (-1: it is the first)."""
        sigmas, steps = self._sigmas, max(1, len(self._sigmas) - 1)
        if current < 0 and sigmas[0] * (1 + NEAR) < sigma <= sigmas[0] * MOST_CHURN * (1 + NEAR):
            self._churn = sigma / sigmas[0]
        order = [*range(max(0, current), steps), *range(max(0, current))]
        if self._churn:
            for step in order:
                if abs(sigmas[step] * self._churn - sigma) <= NEAR * sigma:
                    return step
        for step in order:
            if step + 1 < len(sigmas) and _between(sigmas[step], sigmas[step + 1], sigma):
                return step
        # Outside of the run's noise levels: the step that begins nearest to it.
        return min(range(steps), key=lambda step: abs(sigmas[step] - sigma))


def _between(begin: float, end: float, sigma: float) -> bool:
    """Whether sigma lies in a step from `begin` to `end`, of which the end belongs to the next one."""
    if begin >= end:
        return begin * (1 + NEAR) + 1e-6 >= sigma > end * (1 + NEAR) + 1e-6
    return begin * (1 - NEAR) - 1e-6 <= sigma < end * (1 - NEAR) - 1e-6


def place_in_whole(sigmas: Sequence[float], time_gone: Callable[[float], float] | None) -> tuple[int, int]:
    """Steps of the whole schedule that a run with these sigmas is a part of, and how many of them came before it.

    time_gone: share of the model's time, 0 to 1, that is over at a sigma; None: not known, the run is the whole. A part
    with n steps over a share s of the time belongs to about n / s steps, since schedules are spread over the time more
    or less evenly.
    """
    steps = max(1, len(sigmas) - 1)
    if time_gone is None or len(sigmas) < 2 or sigmas[-1] >= sigmas[0]:  # noise that rises has no dense beginning
        return steps, 0
    begin, end = time_gone(sigmas[0]), time_gone(sigmas[-1])
    total = steps / max(end - begin, 1e-6)
    if begin < BEGINNING:
        return (steps if total > MOST_STEPS else max(steps, math.floor(total + 0.5))), 0
    before = max(1, math.floor(begin * total + 0.5))
    return max(before + steps, math.floor(total + 0.5)), before


@dataclass(frozen=True)
class Schedule:
    """Dense steps are the first ones of the whole schedule; dense blocks are parsed from the user's text.

    steps: the run's own. whole, before: steps of the schedule that the run is a part of, and those of them before it.
    dense_whole: dense steps of the whole; dense_steps: those of them in this run.
    """

    steps: int
    whole: int
    before: int
    dense_whole: int
    dense_blocks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_run(
        cls,
        sigmas: Sequence[float],
        dense_steps: Callable[[int], int],
        dense_blocks: str,
        time_gone: Callable[[float], float] | None,
    ) -> Schedule:
        """Of a run that may be a part; `dense_steps` tells how many steps of a whole schedule are dense, the rest is as
        in `place_in_whole`."""
        whole, before = place_in_whole(sigmas, time_gone)
        dense = min(dense_steps(whole), whole)
        return cls(max(1, len(sigmas) - 1), whole, before, dense, parse_blocks(dense_blocks))

    @property
    def dense_steps(self) -> int:
        return min(max(0, self.dense_whole - self.before), self.steps)

    def is_dense_step(self, step: int) -> bool:
        return step < self.dense_steps

    def group(self, step: int, groups: int) -> int:
        """Which of `groups` equal stretches of the whole schedule's sparse steps the middle of a step lies in.

        Where the steps do not divide evenly, first and last group have the same number: the mean density stays.
        """
        sparse = self.whole - self.dense_whole
        place = self.before + step - self.dense_whole
        return min(groups - 1, max(0, (2 * place + 1) * groups // (2 * sparse))) if sparse else 0

    def is_dense_block(self, index: int, total: int | None) -> bool:
        return in_blocks(self.dense_blocks, index, total)


@dataclass
class StepClock:
    """Wall-clock seconds of each step by kind, and how many steps there were. The host waits for the device between
    steps, so the seconds add up. A step that a sampler goes back to counts again.

    sparse: the steps with a sparse call. compared: (step, seconds) of those that were meant to be dense or sparse, and
    were.
    """

    step: int = -1
    kind: str = ""
    began: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    happened: int = 0
    dense: int = 0
    sparse: list[int] = field(default_factory=list)
    compared: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _sparse_calls: int = 0

    def next(self, step: int, kind: str, sparse_calls: int) -> None:
        """A step begins, and the one before it has ended; sparse_calls: of the whole run up to here."""
        now = time.perf_counter()
        if self.kind:
            self.seconds.setdefault(self.kind, []).append(now - self.began)
            self.happened += 1
            was = "dense" if sparse_calls == self._sparse_calls else "sparse"
            self.dense += was == "dense"
            self.sparse += [self.step] * (was == "sparse")
            if was == self.kind:
                self.compared.setdefault(was, []).append((self.step, now - self.began))
        self.step, self.kind, self.began, self._sparse_calls = step, kind, now, sparse_calls

    def medians(self) -> dict[str, float]:
        """Median seconds per step of each kind."""
        return {kind: statistics.median(values) for kind, values in self.seconds.items()}
