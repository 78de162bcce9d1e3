"""One token grid within a run: where the plan comes from, and what calibration the run does for it on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ...kernels.core.layout import TokenLayout
from ..attention.patterns import PatternCache
from ..calibration.calibrator import Calibrator
from ..calibration.options import Method
from ..plan.options import MaskOptions, query_block
from ..plan.plan import IN_PASSING, Plan, PlanError, Site
from ..plan.store import FoundPlan
from .course import Course
from .policy import Policy
from .run_log import RunLog


@dataclass
class GridRun:
    """State of one token grid. `source`: where the plan comes from; `seen_step`: what the calibrator saw.

    coming: what `plan` is the beginning of, as long as the orders and masks are still being read; no sparse call may
    come before that. lost: why there is no plan, where one was dropped or could not be made. begun: what each site has
    by itself in a sparse step that finds no plan; the sites of that step are observed, and share a plan from the next
    one on. sites: those that were met on this grid.
    """

    layout: TokenLayout
    plan: Plan | None = None
    source: str = ""
    calibrator: Calibrator | None = None
    seen_step: int | None = None
    coming: FoundPlan | None = None
    begun: Plan | None = None
    lost: str = ""
    sites: set[Site] = field(default_factory=set)

    @property
    def present_plan(self) -> Plan | None:
        """The plan, or what there is of it in the step that makes it."""
        return self.begun if self.plan is None else self.plan

    def drop(self, reason: str) -> None:
        """There is no plan and no calibration any more."""
        self.plan = self.begun = self.calibrator = self.seen_step = None
        self.source, self.lost = "none", reason


class GridPlans:
    """Opens the grids of one run, and finds, reads or makes their plans.

    options_on: what shapes the masks on a grid. method: how plans are made of what the run observes.
    updates_bias: sparse steps measure the tail's bias themselves. watched: all steps are dense, for a calibrator of
    the caller's.
    """

    def __init__(
        self,
        policy: Policy,
        course: Course,
        log: RunLog,
        patterns: PatternCache,
        options_on: Callable[[TokenLayout], MaskOptions],
        *,
        method: Method,
        updates_bias: bool,
        watched: bool,
    ) -> None:
        self._policy = policy
        self._course = course
        self._log = log
        self._patterns = patterns
        self._options_on = options_on
        self._method = method
        self._updates_bias = updates_bias
        self._watched = watched
        self._saving: list[threading.Thread] = []

    def open(self, layout: TokenLayout, step: int) -> GridRun:
        """A grid that is first met in this step: with the given plan, one from the plan folder, or a calibrator."""
        grid, policy = GridRun(layout), self._policy
        if self._watched:
            grid.source = "calibrating"
        elif policy.plan is not None:
            reason = policy.plan.foreign(policy.identity)
            if reason is None:
                self._use_given(grid, policy.plan)
            else:
                self._log.note(f"{reason}; calibrating anew")
        elif policy.store is not None:
            self._look_up(grid)
        if grid.plan is None and not self._watched:
            self._calibrate(grid, step)
        return grid

    def _use_given(self, grid: GridRun, given: Plan) -> None:
        if given.identity.weights != self._policy.identity.weights:
            others = "plan: made for other weights of this model, of a fine-tune or LoRA say"
            self._log.note(f"{others}; make one for these if the picture suffers")
        grid.plan, grid.source = given.moved(grid.layout), "given plan"
        if given.layout.grid != grid.layout.grid:
            grid.source = "given plan, moved to this grid"
            self._log.note(f"plan: moved from the grid {grid.plan.made['moved_from']}, the run measures its masks")

    def _look_up(self, grid: GridRun) -> None:
        block_q, options = query_block(grid.layout.grid_tokens), self._options_on(grid.layout)
        found, note = self._policy.store.find(self._policy.identity, grid.layout, block_q, options)
        if found is not None and self._wanted(found.header, options):
            grid.plan, grid.source, grid.coming = found.header, "plan found", found.begin_reading()
        elif note:
            self._log.note(f"{note}; calibrating anew")

    def _wanted(self, found: Plan, options: MaskOptions) -> bool:
        """Whether to use a plan that was found. What another run made on the way serves only where that was asked for
        or nothing else can be had, and, made of noise alone, only where this run sees no more in a dense step."""
        made, schedule = found.made, self._course.schedule
        if made.get("by") != IN_PASSING or not self._policy.settings.calibrate:
            return True
        from_noise = made.get("criterion") == "mass" and made.get("step") == 0
        chosen_by_error = options.pool is not None and self._method.criterion == "auto"
        sees_more = schedule.dense_steps > 0 and schedule.before + schedule.dense_steps > 1
        return self._policy.remember and not (from_noise and chosen_by_error and sees_more)

    def _calibrate(self, grid: GridRun, step: int) -> None:
        if self._policy.settings.calibrate:
            grid.source = IN_PASSING
            self.renew_calibrator(grid, step)

    def renew_calibrator(self, grid: GridRun, step: int) -> None:
        """For a grid that has no plan at this step: it sees the last dense step, or this one if that is over."""
        schedule = self._course.schedule
        seen = max(step, schedule.dense_steps - 1)
        method = self._method.in_passing(self._course.noisy(seen))
        # A sparse step that sees its masks itself goes by what it saw.
        own = not self._policy.remember and self._updates_bias
        later = own and schedule.is_dense_step(seen)
        options = self._options_on(grid.layout)
        grid.calibrator = Calibrator(self._policy.identity, options, method=method, bias_later=later)

    def receive(self, grid: GridRun, step: int) -> None:
        """The plan that was found is needed from this step on: wait for it, or calibrate if it turns out damaged."""
        coming, grid.coming = grid.coming, None
        try:
            grid.plan = coming.plan()
        except Exception as error:
            damaged = isinstance(error, PlanError)
            if self._policy.settings.strict and not damaged:
                raise
            reason = str(error) if damaged else f"plan: could not be read ({type(error).__name__}: {str(error)[:200]})"
            self._log.note(f"{reason}; calibrating anew")
            grid.plan, grid.source = None, "none"
            self._calibrate(grid, step)

    def close_calibration(self, grid: GridRun, keep: bool) -> None:
        """Make the grid's plan of what was observed; keep: in the plan folder too, where the policy says so."""
        schedule = self._course.schedule
        try:
            with self._log.timed("calibration"):
                grid.plan = grid.calibrator.plan({"by": IN_PASSING, "step": grid.seen_step, "steps": schedule.steps})
        except Exception as error:
            if self._policy.settings.strict:
                raise
            # Out of memory, say: the run goes on dense, and does not try again at every evaluation.
            said = f"{type(error).__name__}: {str(error)[:200]}"
            self._log.note(f"calibration: no plan could be made ({said})")
            grid.lost = f"no plan: it could not be made ({said})"
            grid.seen_step = grid.calibrator = grid.begun = None
            self._patterns.clear()
            return
        grid.calibrator = None
        if grid.begun is not None:
            grid.begun = None
            self._patterns.clear()
        if keep and self._policy.store is not None and self._policy.remember:
            self._save(grid)

    def _save(self, grid: GridRun) -> None:
        # Later runs would find no masks for what this one could not observe, and never look again.
        missing = [site.name for site in sorted(grid.sites - set(grid.plan.sites) - self._log.dense_block_sites)]
        if missing:
            self._log.note(f"plan: not kept, {', '.join(missing[:3])}{' …' * (len(missing) > 3)} could not be observed")
        else:
            self._saving.append(self._policy.store.save_beside(grid.plan, self._log.note))

    def wait(self) -> None:
        """Until every plan that is being saved is on disk."""
        for saving in self._saving:
            saving.join()
