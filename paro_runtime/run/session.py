"""One run: from the beginning of a sampling to the report.

A session is created when a sampling begins and dropped when it ends. Each model evaluation is an `Evaluation`; each
self-attention call asks it one question: may this call be PARO's, and if not, why?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from ...kernels.core.dispatch import capability_of_gpu, resolve, resolve_precision
from ...kernels.core.layout import TokenLayout
from ...kernels.core.precision import PRECISIONS
from ...kernels.core.scratch import release_scratch
from ..attention.patterns import PatternCache
from ..calibration.calibrator import Calibrator
from ..calibration.options import Method
from ..compiling.readiness import Readiness
from ..config.recipes import mask_options, raised_density
from ..plan.options import MaskOptions, query_block
from ..report.report import Report
from .attempt import Attempt
from .course import Course
from .evaluation import Evaluation
from .grid_run import GridPlans, GridRun
from .policy import Policy
from .run_log import RunLog
from .schedule import Schedule
from .tail_bias import TailBiasUpdate

# Grid tokens below which a data-centre GPU (its generation) is done with a dense call before choosing blocks has paid.
# Eight steps on an H200: Z-Image at 9,216 tokens takes 2.4 s dense by cuDNN and 2.7 s sparse, Qwen-Image at 6,889
# 2.6 and 4.3 s, Flux 1 at 16,384 6.4 and 6.1 s (bench/results/whole_run_h200.json, af143df).
SPARSE_FROM = {9: 12_288, 10: 12_288}


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
        self.calibrator = calibrator
        self.calibrate_steps = calibrate_steps
        self.lasting = lasting
        self.log = RunLog(self.settings.precision, self.settings.verbose)
        self.lock = self.log.lock
        self.course = Course(policy, sigmas, highest_noise, time_gone)
        self.rotates = True  # False: the rotated kernel failed its self-check
        self.quiet = False  # shows nothing and keeps no plan: another session of the same model does
        self._on_status = on_status
        self.patterns = PatternCache()
        # Who wants every fallback as an error wants no step that waits for a compiler on the host's attention.
        self.readiness = Readiness(self.options, compile_ahead=not self.settings.strict)
        self._unsuitable: dict[tuple, str | None] = {}
        self.refresh = TailBiasUpdate() if refresh else None
        self._grids: dict[tuple[int, int, int], GridRun] = {}
        self._plans = GridPlans(
            policy,
            self.course,
            self.log,
            self.patterns,
            self.options_on,
            method=method or Method(),
            updates_bias=refresh,
            watched=calibrator is not None,
        )

    @property
    def sigmas(self) -> list[float]:
        """The run's noise levels, last one included."""
        return self.course.sigmas

    @property
    def schedule(self) -> Schedule:
        """Which steps and blocks keep everything."""
        return self.course.schedule

    @property
    def steps(self) -> int:
        """How many the run has."""
        return self.course.schedule.steps

    def follow(self, sigmas: Sequence[float]) -> None:
        """From here on these are the run's noise levels: some samplers bring their own."""
        with self.lock:
            self.course.follow(sigmas)
            self.log.clock.step = -1

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
            clock = self.log.clock
            step = self.course.step(sigma, clock.step)
            if not self._grids:
                self.course.begins_on(layout)
            grid = self._grids.get(layout.grid)
            if grid is None:
                grid = self._grids[layout.grid] = self._plans.open(layout, step)
            if grid.coming is not None and not self.schedule.is_dense_step(step):
                self._plans.receive(grid, step)
            if grid.plan is None and grid.seen_step is not None and step != grid.seen_step:
                self._plans.close_calibration(grid, keep=not self.quiet)
            if grid.calibrator is not None and grid.seen_step is None and step != clock.step:
                # What it sees depends on when it first may: kernels can come late.
                self._plans.renew_calibrator(grid, step)
            if step != clock.step:
                kind = self._step_kind(step, grid)
                clock.next(step, kind, self.log.counts.sparse)
                self.say(f"step {step + 1}/{self.steps} · {layout.grid_tokens:,} tokens · {kind}")
            return Evaluation(self, layout, grid, step, attempt or self.attempt())

    def attempt(self, can_redo: bool = False) -> Attempt:
        """One at an evaluation of the model, for `begin`."""
        return Attempt(self.log, self.saved, self.settings.strict, can_redo)

    def grids(self) -> list[GridRun]:
        """Those that were met, in the order they came."""
        return list(self._grids.values())

    def decline(self, reason: str) -> None:
        """Count an evaluation that is not ours, with the reason."""
        self.log.count("passed", reason)

    def finish(self) -> Report:
        """End of the run: close what calibration is still open, and report."""
        with self.lock:
            for grid in self._grids.values():
                if grid.coming is not None:
                    self._plans.receive(grid, self.steps)
                if grid.plan is None and grid.seen_step is not None:
                    self._plans.close_calibration(grid, keep=not self.quiet)
            self._plans.wait()
            if self.settings.dense_blocks and self.log.sites and not self.log.dense_block_sites:
                named = f"dense_blocks: the model has none of the blocks {self.settings.dense_blocks}"
                self.log.note(f"{named}, all are treated alike; name blocks that it has, or leave it empty")
            self.log.clock.next(self.steps, "", self.log.counts.sparse)
            report = Report.of(
                self.policy,
                self.schedule,
                self.log,
                self.grids(),
                calibrating=self.calibrator is not None,
                attention_error=None if self.refresh is None else self.refresh.error,
            )
            self.patterns.clear()
        release_scratch()
        self.say(report.status())
        return report

    def absorb(self, other: Session) -> None:
        """Count what a session of the same model, on another device and over by now, did as this one's."""
        self.log.absorb(other.log)

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
        self.log.precision = resolve_precision(self.settings.precision, self.policy.recipe.precision, device)
        precision = PRECISIONS[self.log.precision]
        found = resolve(self.settings.backend, device, dtype, head_dim, precision)
        if found.reason is not None:
            return found.reason
        self.log.backend = backend = found.by
        least = self.settings.min_tokens
        if least is None:
            # The reference exists for checking, not for speed; a floor would only hide it.
            least = self.policy.recipe.min_tokens if backend == "triton" else 0
        if tokens < least:
            return f"{tokens} grid tokens, below the minimum of {least}"
        return None

    def not_ready_reason(self, q, k, layout: TokenLayout, step: int, biased: bool) -> str | None:
        """Why the kernels cannot serve calls like this in this step, or None; see `Readiness.reason`."""
        call = {"precision": self.log.precision, "backend": self.log.backend}
        return self.readiness.reason(q, k, layout, step, biased=biased, **call)

    def say(self, text: str) -> None:
        """Show one line on the node. Trouble with that is no trouble of the run, but with `strict`."""
        if self._on_status is None or self.quiet:
            return
        try:
            self._on_status(text)
        except Exception as error:
            if self.settings.strict:
                raise
            self.log.log_once("the line on the node", error)

    def too_short_to_drop(self, tokens: int, device: torch.device) -> str | None:
        """Why a grid this small keeps every block, in PARO's own precision, or None. Where the user gives a density,
        or nothing is to be gained (the reference), it is not asked."""
        capability = capability_of_gpu(device)
        least = max(self.policy.recipe.sparse_tokens, SPARSE_FROM.get(capability and capability[0], 0))
        if tokens >= least or self.settings.density is not None or self.log.backend != "triton":
            return None
        return f"every block kept: {tokens} grid tokens, sparse from {least} on"

    def _step_kind(self, step: int, grid: GridRun) -> str:
        if grid.plan is not None:
            return "dense" if self.schedule.is_dense_step(step) else "sparse"
        watching = grid.calibrator is not None and step >= self.schedule.dense_steps - 1
        return "calibrating" if watching or self.calibrator is not None else "dense"
