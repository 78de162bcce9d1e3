"""The state of one run: which steps and sites are sparse, calibration on the way, reasons, and the report.

A session is created when a sampling begins and dropped when it ends. Each model evaluation is an `Evaluation`; each
self-attention call asks it one question: may this call be PARO's, and if not, why?
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..kernels.problem import PRECISIONS, SparsePattern
from ..kernels.scratch import ScratchOutOfMemory, release_scratch
from .attention import (
    dense_pattern,
    pattern_of,
    resolve_backend,
    resolve_precision,
    run_kernel,
    self_check,
)
from .calibration import Calibrator
from .plan import ModelIdentity, Plan, PlanError, Site
from .plan_store import PlanStore
from .portability import MovedPlanCheck, move_plan
from .recipes import Recipe, mask_options, query_block
from .refresh import BiasRefresh
from .report import Report
from .schedule import Schedule, step_index
from .settings import Settings
from .tokens import TokenLayout

log = logging.getLogger("paro")

# Patterns of sites stay on the device up to about this share of its memory. Making one anew on an H100 costs a fifth of
# its attention at density 0.3, so the share is what the sites of a 14B model at 720p need there.
PATTERN_CACHE_SHARE = 1 / 24
PATTERN_CACHE_BYTES = 1 << 30  # where the device does not tell its memory
# A mask, its bits, and a 16-bit list of what is kept.
PATTERN_BYTES_PER_BLOCK = 2


@dataclass(frozen=True)
class Policy:
    """What one patched model does: its identity, the recipe, the user's settings, a given plan, the plan folder."""

    identity: ModelIdentity
    recipe: Recipe
    settings: Settings
    plan: Plan | None = None
    store: PlanStore | None = None


@dataclass
class _Grid:
    """One token grid within a run. `source`: where its plan comes from; `seen_step`: what its calibrator saw."""

    layout: TokenLayout
    plan: Plan | None = None
    source: str = ""
    calibrator: Calibrator | None = None
    seen_step: int | None = None
    check: MovedPlanCheck | None = None


@dataclass
class Counts:
    """What happened to attention calls, by reason."""

    sparse: int = 0
    dense: Counter = field(default_factory=Counter)
    passed: Counter = field(default_factory=Counter)
    fallbacks: Counter = field(default_factory=Counter)


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
    ) -> None:
        """sigmas: the run's noise levels, falling, last one included (steps + 1 values).

        refresh: measure the tail's bias again in some sparse steps; False keeps the plan's.
        With a calibrator the whole run is dense and the calibrator sees `calibrate_steps` (default: every step).
        """
        self.policy = policy
        self.settings = policy.settings.validated()
        self.sigmas = [float(s) for s in sigmas]
        self.steps = max(1, len(self.sigmas) - 1)
        self.options = mask_options(self.settings, policy.recipe)
        wanted = self.settings.dense_steps
        if wanted is None:
            wanted = policy.recipe.dense_steps(self.steps)
        blocks = self.settings.dense_blocks or policy.recipe.dense_blocks
        self.schedule = Schedule.create(self.steps, wanted, blocks)
        self.precision = self.settings.precision  # `auto` until the device is known
        self.calibrator = calibrator
        self.calibrate_steps = calibrate_steps
        self.counts = Counts()
        self.notes: list[str] = []
        self.sites: set[Site] = set()
        self.sparse_sites: set[Site] = set()
        self.dense_block_sites: set[Site] = set()
        self.off_sites: dict[Site, str] = {}
        self.calibration_seconds = 0.0
        self.tail_seconds = 0.0
        self.backend = ""
        self.device = ""
        self._on_status = on_status
        self._grids: dict[tuple[int, int, int], _Grid] = {}
        self._patterns: dict[tuple, SparsePattern] = {}
        self._pattern_bytes = 0
        self._unsuitable: dict[tuple, str | None] = {}
        self._logged: set[str] = set()
        self._clock = StepClock()
        self._refresh = BiasRefresh() if refresh else None
        self._lock = threading.RLock()

    def begin(self, *, layout: TokenLayout, sigma: float, chunks: tuple[int, ...] = (0,)) -> Evaluation:
        """One model evaluation at noise level `sigma`; chunks as the host batches conditionings (for the log)."""
        step = step_index(self.sigmas, sigma)
        with self._lock:
            grid = self._grids.get(layout.grid)
            if grid is None:
                grid = self._grids[layout.grid] = self._open_grid(layout)
            if grid.plan is None and grid.seen_step is not None and step > grid.seen_step:
                self._close_calibration(grid)
            if grid.check is not None and step != self._clock.step:
                self._judge_moved_plan(grid)
            if step != self._clock.step:
                kind = self._step_kind(step, grid)
                self._clock.next(step, kind)
                self._tell(f"step {step + 1}/{self.steps} · {layout.grid_tokens:,} tokens · {kind}")
        return Evaluation(self, layout, grid, step)

    def decline(self, reason: str) -> None:
        """Count a call that is not ours, with the reason."""
        self._count("passed", reason)

    def finish(self) -> Report:
        """End of the run: close what calibration is still open, and report."""
        with self._lock:
            for grid in self._grids.values():
                if grid.plan is None and grid.seen_step is not None:
                    self._close_calibration(grid)
            self._clock.next(self.steps, "")
            report = Report.of(self, max(self._grids.values(), key=lambda g: g.layout.grid_tokens, default=None))
            self._patterns.clear()
        release_scratch()
        self._tell(report.status())
        return report

    @property
    def step_seconds(self) -> dict[str, float]:
        """Median seconds of a dense, calibrating and sparse step, of those there were."""
        return self._clock.medians()

    # Below: used by Evaluation.

    def _open_grid(self, layout: TokenLayout) -> _Grid:
        grid = _Grid(layout)
        if self.calibrator is not None:
            grid.source = "calibrating"
            return grid
        given = self.policy.plan
        if given is not None:
            reason = given.foreign(self.policy.identity)
            if reason is None:
                if given.identity.weights != self.policy.identity.weights:
                    self._note("plan: made for other weights of the same architecture; a fine-tune or LoRA may differ")
                grid.plan, grid.source = given, "given plan"
                if given.layout.grid != layout.grid:
                    grid.plan, grid.source = move_plan(given, layout), "given plan, moved to this grid"
                    grid.check = MovedPlanCheck(grid.plan)
                return grid
            self._note(f"{reason}; calibrating anew")
        elif self.policy.store is not None:
            found, note = self.policy.store.find(
                self.policy.identity, layout, query_block(layout.grid_tokens), self.options
            )
            if found is not None:
                grid.plan, grid.source = found, "plan found"
                return grid
            if note:
                self._note(f"{note}; calibrating anew")
        if self.settings.calibrate:
            grid.calibrator, grid.source = Calibrator(self.policy.identity, self.options), "calibrated on the way"
        return grid

    def _judge_moved_plan(self, grid: _Grid) -> None:
        verdict = grid.check.verdict()
        if verdict is None:
            return
        stays, text = verdict
        self._note(text)
        grid.check = None
        if not stays:
            grid.plan = None
            self._patterns.clear()
            self._pattern_bytes = 0
            if self.settings.calibrate:
                grid.calibrator = Calibrator(self.policy.identity, self.options)
                grid.source = "calibrated on the way"

    def _close_calibration(self, grid: _Grid) -> None:
        began = time.perf_counter()
        made = {"by": "calibrated on the way", "step": grid.seen_step, "steps": self.steps}
        try:
            grid.plan = grid.calibrator.plan(made)
        except PlanError as error:
            self._note(str(error))
            grid.seen_step = None
            return
        finally:
            self.calibration_seconds += time.perf_counter() - began
        grid.calibrator = None
        if self.policy.store is not None:
            try:
                self.policy.store.save(grid.plan)
            except OSError as error:  # a full or read-only disk must not end the run
                self._note(f"plan: could not be saved ({error.strerror or error})")

    def _pattern(self, site: Site, grid: _Grid, layout: TokenLayout, kv_heads: int, device) -> SparsePattern:
        key = (site, layout, device)
        with self._lock:
            if key in self._patterns:
                return self._patterns[key]
        plan = grid.plan
        pattern = pattern_of(
            plan.sites[site], layout, block_q=plan.block_q, pool=plan.pool, kv_heads=kv_heads, device=device
        )
        size = pattern.mask.numel() * PATTERN_BYTES_PER_BLOCK
        with self._lock:
            # Sites come round in the same order in every evaluation: dropping the oldest would drop each just before
            # it is wanted again, so what does not fit is made anew every time instead.
            if self._pattern_bytes + size <= _pattern_cache_bytes(device):
                self._patterns[key] = pattern
                self._pattern_bytes += size
        return pattern

    def _unsuitable_reason(self, tokens: int, q: torch.Tensor) -> str | None:
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
        return self_check(device, dtype, head_dim, self.precision, backend)

    def _count(self, kind: str, reason: str) -> None:
        with self._lock:
            getattr(self.counts, kind)[reason] += 1
            first = reason not in self._logged
            self._logged.add(reason)
        if kind == "fallbacks" and (first or self.settings.verbose):
            log.warning("%s", reason)
        elif kind == "passed" and (first or self.settings.verbose):
            log.debug("%s", reason)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            log.warning("%s", text)

    def _tell(self, text: str) -> None:
        if self._on_status is not None:
            self._on_status(text)

    def _too_short_to_drop(self, tokens: int) -> str | None:
        """Why a grid this small keeps every block, in PARO's own precision, or None. Where the user gives a density,
        or nothing is to be gained (the reference), it is not asked."""
        least = self.policy.recipe.sparse_tokens
        if tokens >= least or self.settings.density is not None or self.backend != "triton":
            return None
        return f"every block kept: {tokens} grid tokens, sparse from {least} on"

    def _step_kind(self, step: int, grid: _Grid) -> str:
        if grid.plan is not None:
            return "dense" if self.schedule.is_dense_step(step) else "sparse"
        watching = grid.calibrator is not None and step >= self.schedule.dense_steps - 1
        return "calibrating" if watching or self.calibrator is not None else "dense"


class Evaluation:
    """One evaluation of the model: a step, a layout, and the plan for its grid."""

    def __init__(self, session: Session, layout: TokenLayout, grid: _Grid, step: int) -> None:
        self.session = session
        self.layout = layout
        self.step = step
        self._grid = grid

    def attend(
        self,
        site: Site,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        key_bias: torch.Tensor | None = None,
        dense: Callable[[], torch.Tensor],
        blocks: int | None = None,
    ) -> torch.Tensor:
        """Attention of one site: sparse where the plan and the schedule say so, else `dense()`.

        q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]` -> `[B, Hq, L, D]` in q's dtype. key_bias additive `[B, L]`.
        dense runs the host's own function. blocks: how many transformer blocks there are, for negative block numbers.
        Trouble of PARO's own never ends the run (unless `strict`): the call is answered by `dense()`.
        """
        session, grid = self.session, self._grid
        reason = session._unsuitable_reason(self.layout.grid_tokens, q)
        if reason is not None:
            session._count("passed", reason)
            return dense()
        session.sites.add(site)
        session.device = str(q.device)
        if session.calibrator is not None:
            self._observe(session.calibrator, site, q, k, v, scale, key_bias, self._calibrates())
            session._count("dense", "calibrating")
            return dense()
        too_short = session._too_short_to_drop(self.layout.grid_tokens)
        if too_short is not None:
            session._count("dense", too_short)
            out = self._guarded(None, q, k, v, scale, key_bias)
            return dense() if out is None else out
        if grid.check is not None:
            grid.check.measure(site, q, k, scale=scale, key_bias=key_bias)
        if session.schedule.is_dense_block(site.block_index, blocks):
            session.dense_block_sites.add(site)
            session._count("dense", "dense block")
            return self._dense(q, k, v, scale, key_bias, dense)
        if grid.plan is None:
            self._observe(grid.calibrator, site, q, k, v, scale, key_bias, self._calibrates())
            waiting = "no plan and calibration is off" if grid.calibrator is None else "dense step"
            session._count("dense" if grid.calibrator is not None else "fallbacks", waiting)
            return self._dense(q, k, v, scale, key_bias, dense)
        if session.schedule.is_dense_step(self.step):
            session._count("dense", "dense step")
            return self._dense(q, k, v, scale, key_bias, dense)
        why_not = session.off_sites.get(site)
        if why_not is None and site not in grid.plan.sites:
            why_not = f"{site.name} is not in the plan"
        if why_not is None:
            out = self._sparse(site, q, k, v, scale, key_bias)
            if out is not None:
                return out
            why_not = session.off_sites[site]
        session._count("fallbacks", why_not)
        return dense()

    def abandon(self, reason: str) -> None:
        """The evaluation's sites were not what they seemed: its grid's plan and observations are dropped, and the rest
        of the run on this grid keeps every block. Raises RuntimeError with `strict`."""
        if self.session.settings.strict:
            raise RuntimeError(reason)
        with self.session._lock:
            self._grid.plan = self._grid.calibrator = self._grid.seen_step = None
            self._grid.source = "none"
            self.session._note(reason)

    def end(self) -> None:
        """The evaluation is over; nothing is held beyond it."""

    def _calibrates(self) -> bool:
        session, grid = self.session, self._grid
        if session.calibrator is not None:
            return session.calibrate_steps is None or self.step in session.calibrate_steps
        return grid.calibrator is not None and self.step >= session.schedule.dense_steps - 1

    def _observe(self, calibrator, site, q, k, v, scale, key_bias, wanted: bool) -> None:
        if not wanted:
            return
        session = self.session
        began = time.perf_counter()
        try:
            calibrator.observe(
                site,
                self.layout,
                q,
                k,
                v,
                step=self.step,
                scale=scale,
                key_bias=key_bias,
                backend=session.backend,
            )
        except Exception as error:
            if session.settings.strict or session.calibrator is not None:
                raise
            session._count("fallbacks", f"calibration of {site.name}: {_one_line(error)}")
            return
        with session._lock:
            if calibrator is self._grid.calibrator:
                self._grid.seen_step = self.step
            session.calibration_seconds += time.perf_counter() - began

    def _dense(self, q, k, v, scale, key_bias, dense) -> torch.Tensor:
        """A call that keeps every block: the host's attention, or PARO's kernel at density 1 if the user prefers."""
        if self.session.settings.dense_attention == "host":
            return dense()
        out = self._guarded(None, q, k, v, scale, key_bias)
        return dense() if out is None else out

    def _sparse(self, site, q, k, v, scale, key_bias) -> torch.Tensor | None:
        out = self._guarded(site, q, k, v, scale, key_bias)
        if out is not None:
            with self.session._lock:
                self.session.counts.sparse += 1
                self.session.sparse_sites.add(site)
        return out

    def _refreshed(self, site: Site, pattern: SparsePattern, q, k, v, scale, key_bias) -> SparsePattern:
        """The pattern with the tail's bias as this run measured it, if it did."""
        refresh = self.session._refresh
        if refresh is None or pattern.tail_bias is None:
            return pattern
        key = (site, self.layout.grid)
        if refresh.due(key, self.step):
            began = time.perf_counter()
            refresh.measure(key, self.step, q, k, v, pattern, scale=scale, key_bias=key_bias)
            self.session.tail_seconds += time.perf_counter() - began
        bias = refresh.bias(key)
        return pattern if bias is None else replace(pattern, tail_bias=bias)

    def _guarded(self, site: Site | None, q, k, v, scale, key_bias) -> torch.Tensor | None:
        """Run PARO's kernel for a planned site, or dense for None. Returns None after noting why it could not."""
        session = self.session
        try:
            if site is None:
                pattern = dense_pattern(self.layout, q.shape[1], k.shape[1], q.device)
            else:
                pattern = session._pattern(site, self._grid, self.layout, k.shape[1], q.device)
                pattern = self._refreshed(site, pattern, q, k, v, scale, key_bias)
            precision = PRECISIONS[session.precision]
            out = run_kernel(q, k, v, pattern, precision, scale=scale, key_bias=key_bias, backend=session.backend)
            if torch.isfinite(torch.linalg.vector_norm(out, torch.inf, dtype=torch.float32)):
                return out
            reason = f"{site.name if site else 'dense attention'}: the result is not finite"
            if session.settings.strict:
                raise FloatingPointError(reason)
        except Exception as error:
            if session.settings.strict:
                raise
            if isinstance(error, (torch.OutOfMemoryError, ScratchOutOfMemory)):
                # The host's attention comes next and needs the memory.
                release_scratch()
                torch.cuda.empty_cache()
            reason = f"{site.name if site else 'dense attention'}: {_one_line(error)}"
        if site is None:
            session._count("fallbacks", reason)
        else:
            session.off_sites[site] = reason
        return None


def _pattern_cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return PATTERN_CACHE_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory * PATTERN_CACHE_SHARE)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
