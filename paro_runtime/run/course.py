"""The course of one run: which of the steps are dense, which begin with noise, and where an evaluation belongs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...kernels.core.layout import TokenLayout
from ..config.recipes import is_small
from .policy import Policy
from .schedule import Schedule, StepFinder

# A step that begins at this share of the model's highest noise begins with nothing else.
PURE_NOISE = 0.99
# What is observed on a small grid in a step that begins at this share or more is told by attention rather than by
# errors of blocks: the tiny model gains nothing by errors at 0.955, and up to 3 dB at 0.9 (docs/method_history.md).
MUCH_NOISE = 0.94


class Course:
    """Noise levels and schedule of one run; both may change when the first evaluations come.

    highest_noise: the model's, in the units of sigmas; None: not known, any run may begin with noise.
    time_gone: share of the model's time that is over at a sigma; None: not known, every run is a whole schedule.
    """

    sigmas: list[float]
    schedule: Schedule

    def __init__(
        self,
        policy: Policy,
        sigmas: Sequence[float],
        highest_noise: float | None,
        time_gone: Callable[[float], float] | None,
    ) -> None:
        self._policy = policy
        self._highest_noise = highest_noise
        self._time_gone = time_gone
        self._small = False  # the grid that the run began with, see `is_small`
        self.follow(sigmas)

    def follow(self, sigmas: Sequence[float]) -> None:
        """From here on these are the run's noise levels, last one included (steps + 1 values)."""
        self.sigmas = [float(s) for s in sigmas]
        self._make_schedule()
        self._finder = StepFinder(self.sigmas)

    def begins_on(self, layout: TokenLayout) -> None:
        """The run begins with this grid, which decides how many of the steps are dense."""
        self._small = is_small(self._policy.settings, layout.grid_tokens)
        self._make_schedule()

    def _make_schedule(self) -> None:
        settings, recipe = self._policy.settings, self._policy.recipe

        def dense_steps(whole: int) -> int:
            return recipe.dense_steps(whole, self._small) if settings.dense_steps is None else settings.dense_steps

        blocks = settings.dense_blocks or recipe.dense_blocks
        self.schedule = Schedule.of_run(self.sigmas, dense_steps, blocks, self._time_gone)

    def step(self, sigma: float, current: int) -> int:
        """The step of an evaluation; see `StepFinder.find`."""
        return self._finder.find(sigma, current)

    @property
    def from_noise(self) -> bool:
        """Whether the run begins with nothing but noise; one from a picture (denoise below 1) has something to see in
        the first step."""
        return self._highest_noise is None or self.sigmas[0] >= PURE_NOISE * self._highest_noise

    def noisy(self, step: int) -> bool:
        """Whether a step begins with hardly anything but noise."""
        if step == 0 and self.from_noise:
            return True
        return self._highest_noise is not None and self.sigmas[step] >= MUCH_NOISE * self._highest_noise
