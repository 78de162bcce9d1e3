"""The state of one run: which steps and sites are sparse, calibration on the way, reasons, and the report.

A session is created when a sampling begins and dropped when it ends. Each model evaluation is an `Evaluation`; each
self-attention call asks it one question: may this call be PARO's, and if not, why?
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from ...kernels.core.dispatch import capability_of_gpu
from ...kernels.core.layout import TokenLayout
from ...kernels.core.precision import PRECISIONS
from ...kernels.core.scratch import release_scratch
from ..attention.backend import resolve_backend, resolve_precision
from ..attention.patterns import PatternCache
from ..calibration.calibrator import Calibrator, Method
from ..compiling.readiness import Readiness
from ..config.recipes import is_small, mask_options, raised_density
from ..plan.options import MaskOptions, query_block
from ..plan.plan import IN_PASSING, Plan, PlanError, Site
from ..plan.store import FoundPlan
from ..report.report import Report
from .attempt import Attempt, Counts
from .evaluation import Evaluation
from .policy import Policy
from .schedule import Schedule, StepClock, StepFinder
from .tail_bias import BiasRefresh

log = logging.getLogger("paro")
# A step that begins at this share of the model's highest noise begins with nothing else.
PURE_NOISE = 0.99
# What is observed on a small grid in a step that begins at this share or more is told by attention rather than by
# errors of blocks: the tiny model gains nothing by errors at 0.955, and up to 3 dB at 0.9 (docs/method_history.md).
MUCH_NOISE = 0.94
# Grid tokens below which a data-centre GPU (its generation) is done with a dense call before choosing blocks has paid.
# Eight steps on an H200: Z-Image at 9,216 tokens takes 2.4 s dense by cuDNN and 2.7 s sparse, Qwen-Image at 6,889
# 2.6 and 4.3 s, Flux 1 at 16,384 6.4 and 6.1 s (bench/results/whole_run_h200.json, af143df).
SPARSE_FROM = {9: 12_288, 10: 12_288}


@dataclass
class Grid:
    """One token grid within a run. `source`: where its plan comes from; `seen_step`: what its calibrator saw.

    coming: what `plan` is the beginning of, as long as its orders and masks are still being read; no sparse call may
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


class Session:
    """State of one run. Safe to call from several threads; nothing in it outlives the run."""

    def __init__(
        self,
        policy: Policy,
        *,
        sigmas: Sequence[float],
        calibrator: Calibrator | None = None,
        calibrate_steps: frozenset[int] | None = None,
        on_status: Callable[[str], None] | None = None,
        refresh: bool = True,
        lasting: Callable[[], AbstractContextManager] = nullcontext,
        method: Method | None = None,
        highest_noise: float | None = None,
        time_gone: Callable[[float], float] | None = None,
    ) -> None:
        """sigmas: the run's noise levels, last one included (steps + 1 values).

        refresh: measure the tail's bias again in some sparse steps; False keeps the plan's.
        lasting: entered around all work that allocates what may outlive its call; see `Evaluation`.
        method: how the run's own plans are made of what passes by (default: what measured best).
        highest_noise: the model's, in the units of sigmas; None: not known, any run may begin with noise.
        time_gone: share of the model's time that is over at a sigma; None: not known, every run is a whole schedule.
        With a calibrator the whole run is dense and the calibrator sees `calibrate_steps` (default: every step).
        """
        self.policy = policy
        self.settings = policy.settings.validated()
        self.options = mask_options(self.settings, policy.recipe)
        self.precision = self.settings.precision  # `auto` until the device is known
        self.calibrator = calibrator
        self.calibrate_steps = calibrate_steps
        self.method = method or Method()
        self.highest_noise = highest_noise
        self.counts = Counts()
        self.notes: list[str] = []
        self.sites: set[Site] = set()
        self.sparse_sites: set[Site] = set()
        self.dense_block_sites: set[Site] = set()
        self.off_sites: dict[Site, str] = {}
        self.routed_sites: set[Site] = set()  # whose masks the run measured itself
        self.dense_off = False
        self.lasting = lasting
        self.calibration_seconds = 0.0
        self.loading_seconds = 0.0  # waited for a plan that was found
        self.tail_seconds = 0.0
        self.backend = ""
        self.device = ""
        self.quiet = False  # shows nothing and keeps no plan: another session of the same model does
        self._on_status = on_status
        self._grids: dict[tuple[int, int, int], Grid] = {}
        self.patterns = PatternCache()
        # Who wants every fallback as an error wants no step that waits for a compiler on the host's attention.
        self.readiness = Readiness(self.options, compile_ahead=not self.settings.strict)
        self._unsuitable: dict[tuple, str | None] = {}
        self._logged: set[str] = set()
        self.clock = StepClock()
        self._saving: list[threading.Thread] = []
        self.refresh = BiasRefresh() if refresh else None
        self.lock = threading.RLock()
        self._time_gone = time_gone
        self._small = False  # the grid that the run began with, see `is_small`
        self.follow(sigmas)

    def follow(self, sigmas: Sequence[float]) -> None:
        """From here on these are the run's noise levels: some samplers bring their own."""
        with self.lock:
            self.sigmas = [float(s) for s in sigmas]
            self._make_schedule()
            self.steps = self.schedule.steps
            self._finder = StepFinder(self.sigmas)
            self.clock.step = -1

    def begins_on(self, layout: TokenLayout) -> None:
        """The run begins with this grid, which decides how many of its steps are dense."""
        self._small = is_small(self.settings, layout.grid_tokens)
        self._make_schedule()

    def _make_schedule(self) -> None:
        chosen, recipe = self.settings.dense_steps, self.policy.recipe

        def dense_steps(whole: int) -> int:
            return recipe.dense_steps(whole, self._small) if chosen is None else chosen

        blocks = self.settings.dense_blocks or recipe.dense_blocks
        self.schedule = Schedule.of_run(self.sigmas, dense_steps, blocks, self._time_gone)

    def begin(
        self,
        *,
        layout: TokenLayout,
        sigma: float,
        attempt: Attempt | None = None,
    ) -> Evaluation:
        """One model evaluation at noise level `sigma`.

        attempt: of the streams of one evaluation, which share it; default: one in which every call looks at its own
        result.
        """
        with self.lock:
            step = self._finder.find(sigma, self.clock.step)
            if not self._grids:
                self.begins_on(layout)
            grid = self._grids.get(layout.grid)
            if grid is None:
                grid = self._grids[layout.grid] = self._open_grid(layout, step)
            if grid.coming is not None and not self.schedule.is_dense_step(step):
                self._receive_plan(grid, step)
            if grid.plan is None and grid.seen_step is not None and step != grid.seen_step:
                self._close_calibration(grid)
            if grid.calibrator is not None and grid.seen_step is None and step != self.clock.step:
                # What it sees depends on when it first may: kernels can come late.
                grid.calibrator = self._calibrator(step, layout)
            if step != self.clock.step:
                kind = self._step_kind(step, grid)
                self.clock.next(step, kind, self.counts.sparse)
                self.say(f"step {step + 1}/{self.steps} · {layout.grid_tokens:,} tokens · {kind}")
            return Evaluation(self, layout, grid, step, attempt or Attempt(self))

    def grids(self) -> list[Grid]:
        """Those that were met, in the order they came."""
        return list(self._grids.values())

    def decline(self, reason: str) -> None:
        """Count an evaluation that is not ours, with the reason."""
        self.count("passed", reason)

    def finish(self) -> Report:
        """End of the run: close what calibration is still open, and report."""
        with self.lock:
            for grid in self._grids.values():
                if grid.coming is not None:
                    self._receive_plan(grid, self.steps)
                if grid.plan is None and grid.seen_step is not None:
                    self._close_calibration(grid)
            for saving in self._saving:
                saving.join()
            if self.settings.dense_blocks and self.sites and not self.dense_block_sites:
                named = f"dense_blocks: the model has none of the blocks {self.settings.dense_blocks}"
                self.note(f"{named}, all are treated alike; name blocks that it has, or leave it empty")
            self.clock.next(self.steps, "", self.counts.sparse)
            report = Report.of(self, max(self._grids.values(), key=lambda g: g.layout.grid_tokens, default=None))
            self.patterns.clear()
        release_scratch()
        self.say(report.status())
        return report

    def absorb(self, other: Session) -> None:
        """Count what a session of the same model, on another device and over by now, did as this one's."""
        with self.lock:
            self.counts.take_over(other.counts)
            for mine, its in (
                (self.sites, other.sites),
                (self.sparse_sites, other.sparse_sites),
                (self.dense_block_sites, other.dense_block_sites),
                (self.routed_sites, other.routed_sites),
            ):
                mine |= its
            self.notes += [note for note in other.notes if note not in self.notes]

    @property
    def step_seconds(self) -> dict[str, float]:
        """Median seconds of a dense, calibrating and sparse step, of those there were."""
        return self.clock.medians()

    def saved(self) -> Callable[[], None]:
        """What puts back everything that sparse calls measure for later ones to how it is now."""
        with self.lock:
            parts = [self.patterns.saved()] + ([] if self.refresh is None else [self.refresh.saved()])

        def restore() -> None:
            for part in parts:
                part()

        return restore

    def options_on(self, layout: TokenLayout) -> MaskOptions:
        """What shapes the masks on this grid."""
        raised = raised_density(self.settings, self.policy.recipe, layout.grid_tokens)
        return self.options if raised is None else replace(self.options, density=raised)

    # Below: used by Evaluation.

    def _open_grid(self, layout: TokenLayout, step: int) -> Grid:
        grid = Grid(layout)
        if self.calibrator is not None:
            grid.source = "calibrating"
            return grid
        given = self.policy.plan
        if given is not None:
            reason = given.foreign(self.policy.identity)
            if reason is None:
                if given.identity.weights != self.policy.identity.weights:
                    others = "plan: made for other weights of this model, of a fine-tune or LoRA say"
                    self.note(f"{others}; make one for these if the picture suffers")
                grid.plan, grid.source = given.moved(layout), "given plan"
                if given.layout.grid != layout.grid:
                    grid.source = "given plan, moved to this grid"
                    self.note(f"plan: moved from the grid {grid.plan.made['moved_from']}, the run measures its masks")
                return grid
            self.note(f"{reason}; calibrating anew")
        elif self.policy.store is not None:
            found, note = self.policy.store.find(
                self.policy.identity, layout, query_block(layout.grid_tokens), self.options_on(layout)
            )
            if found is not None and self._wanted(found.header):
                grid.plan, grid.source, grid.coming = found.header, "plan found", found.begin_reading()
                return grid
            if note:
                self.note(f"{note}; calibrating anew")
        if self.settings.calibrate:
            grid.calibrator, grid.source = self._calibrator(step, layout), IN_PASSING
        return grid

    def _receive_plan(self, grid: Grid, step: int) -> None:
        """The plan that was found is needed from this step on: wait for it, or calibrate if it turns out damaged."""
        coming, grid.coming = grid.coming, None
        began = time.perf_counter()
        try:
            grid.plan = coming.plan()
        except Exception as error:
            damaged = isinstance(error, PlanError)
            if self.settings.strict and not damaged:
                raise
            reason = str(error) if damaged else f"plan: could not be read ({type(error).__name__}: {str(error)[:200]})"
            self.note(f"{reason}; calibrating anew")
            grid.plan, grid.source = None, "none"
            if self.settings.calibrate:
                grid.calibrator, grid.source = self._calibrator(step, grid.layout), IN_PASSING
        finally:
            self.loading_seconds += time.perf_counter() - began

    def _wanted(self, found: Plan) -> bool:
        """Whether to use a plan that was found. What another run made on the way serves only where that was asked for
        or nothing else can be had, and, made of noise alone, only where this run sees no more in a dense step."""
        if found.made.get("by") != IN_PASSING or not self.settings.calibrate:
            return True
        its = self.schedule
        sees_more = its.dense_steps > 0 and its.before + its.dense_steps > 1
        return self.policy.remember and not (self.of_pure_noise(found) and sees_more)

    def of_pure_noise(self, plan: Plan) -> bool:
        """Whether a run made this plan of a first step of pure noise, where this one would choose blocks by error."""
        made = plan.made
        from_noise = made.get("by") == IN_PASSING and made.get("criterion") == "mass" and made.get("step") == 0
        return from_noise and self.options.pool is not None and self.method.criterion == "auto"

    @property
    def from_noise(self) -> bool:
        """Whether the run begins with nothing but noise; one from a picture (denoise below 1) has something to see in
        its first step."""
        return self.highest_noise is None or self.sigmas[0] >= PURE_NOISE * self.highest_noise

    def _calibrator(self, step: int, layout: TokenLayout) -> Calibrator:
        """For a grid that has no plan at this step: it sees the last dense step, or this one if that is over."""
        seen = max(step, self.schedule.dense_steps - 1)
        method = self.method.in_passing(self._noisy(seen))
        # A sparse step that sees its masks itself goes by what it saw.
        own = not self.policy.remember and self.refresh is not None
        later = own and self.schedule.is_dense_step(seen)
        return Calibrator(self.policy.identity, self.options_on(layout), method=method, bias_later=later)

    def _noisy(self, step: int) -> bool:
        """Whether a step begins with hardly anything but noise."""
        if step == 0 and self.from_noise:
            return True
        return self.highest_noise is not None and self.sigmas[step] >= MUCH_NOISE * self.highest_noise

    def _close_calibration(self, grid: Grid) -> None:
        began = time.perf_counter()
        made = {"by": IN_PASSING, "step": grid.seen_step, "steps": self.steps}
        try:
            grid.plan = grid.calibrator.plan(made)
        except Exception as error:
            if self.settings.strict:
                raise
            # Out of memory, say: the run goes on dense, and does not try again at every evaluation.
            said = f"{type(error).__name__}: {str(error)[:200]}"
            self.note(f"calibration: no plan could be made ({said})")
            grid.lost = f"no plan: it could not be made ({said})"
            grid.seen_step = grid.calibrator = grid.begun = None
            self.patterns.clear()
            return
        finally:
            self.calibration_seconds += time.perf_counter() - began
        grid.calibrator = None
        if grid.begun is not None:
            grid.begun = None
            self.patterns.clear()
        if self.policy.store is not None and self.policy.remember and not self.quiet:
            # Later runs would find no masks for what this one could not observe, and never look again.
            missing = [site.name for site in sorted(grid.sites - set(grid.plan.sites) - self.dense_block_sites)]
            if missing:
                self.note(f"plan: not kept, {', '.join(missing[:3])}{' …' * (len(missing) > 3)} could not be observed")
            else:
                self._saving.append(self.policy.store.save_beside(grid.plan, self.note))

    def unsuitable_reason(self, tokens: int, q: torch.Tensor) -> str | None:
        """Why no call on a grid of `tokens` with such a q `[B, H, L, D]` can be PARO's, or None; asked once each."""
        key = (tokens, q.device, q.dtype, q.shape[3])
        if key not in self._unsuitable:
            self._unsuitable[key] = self._find_unsuitable(*key)
        return self._unsuitable[key]

    def _find_unsuitable(self, tokens: int, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if not dtype.is_floating_point or dtype == torch.float64:
            return f"dtype {dtype} is not supported"
        if tokens < 2 * query_block(tokens):
            return f"{tokens} grid tokens do not fill two blocks of {query_block(tokens)}"
        self.precision = resolve_precision(self.settings.precision, self.policy.recipe.precision, device)
        precision = PRECISIONS[self.precision]
        backend, reason = resolve_backend(self.settings.backend, device, dtype, head_dim, precision)
        if reason is not None:
            return reason
        self.backend = backend
        least = self.settings.min_tokens
        if least is None:
            # The reference exists for checking, not for speed; a floor would only hide it.
            least = self.policy.recipe.min_tokens if backend == "triton" else 0
        if tokens < least:
            return f"{tokens} grid tokens, below the minimum of {least}"
        return None

    def not_ready_reason(self, q, k, layout: TokenLayout, step: int, biased: bool) -> str | None:
        """Why the kernels cannot serve calls like this in this step, or None; see `Readiness.reason`."""
        call = {"precision": self.precision, "backend": self.backend}
        return self.readiness.reason(q, k, layout, step, biased=biased, **call)

    def count(self, kind: str, reason: str) -> None:
        with self.lock:
            self.counts.add(kind, reason)
            first = reason not in self._logged
            self._logged.add(reason)
        if kind == "fallbacks" and (first or self.settings.verbose):
            log.warning("%s", reason)
        elif kind == "passed" and (first or self.settings.verbose):
            log.debug("%s", reason)

    def log_once(self, where: str, error: Exception) -> None:
        """The traceback of an error that nobody foresaw, once in a run for each kind."""
        with self.lock:
            kind = f"{where} {type(error).__name__}"
            first = kind not in self._logged
            self._logged.add(kind)
        if first:
            log.error("%s went wrong; the host's attention goes on", where, exc_info=error)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            log.warning("%s", text)

    def say(self, text: str) -> None:
        """Show one line on the node."""
        if self._on_status is not None and not self.quiet:
            self._on_status(text)

    def too_short_to_drop(self, tokens: int, device: torch.device) -> str | None:
        """Why a grid this small keeps every block, in PARO's own precision, or None. Where the user gives a density,
        or nothing is to be gained (the reference), it is not asked."""
        capability = capability_of_gpu(device)
        least = max(self.policy.recipe.sparse_tokens, SPARSE_FROM.get(capability and capability[0], 0))
        if tokens >= least or self.settings.density is not None or self.backend != "triton":
            return None
        return f"every block kept: {tokens} grid tokens, sparse from {least} on"

    def _step_kind(self, step: int, grid: Grid) -> str:
        if grid.plan is not None:
            return "dense" if self.schedule.is_dense_step(step) else "sparse"
        watching = grid.calibrator is not None and step >= self.schedule.dense_steps - 1
        return "calibrating" if watching or self.calibrator is not None else "dense"
