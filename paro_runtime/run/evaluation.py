"""One evaluation of the model within a run: every self-attention call is answered here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ...kernels.core.layout import TokenLayout
from ...kernels.core.pattern import SparsePattern, empty_output
from ...kernels.core.scratch import ScratchOutOfMemory, release_scratch
from ..attention.backend import run_kernel
from ..attention.dense import dense_pattern, in_16_bits, paro_is_faster, paro_pays_when_short
from ..attention.patterns import with_bias
from ..calibration.tail_fit import BiasObservation
from ..compiling.readiness import COMPILING
from ..compiling.self_check import site_precision
from ..plan.options import GROUPS
from ..plan.plan import Plan, PlanError, Site
from ..report.reasons import hint_of, words_of
from .attempt import Attempt, not_finite
from .masks import routed_bits
from .tail_bias import is_short

if TYPE_CHECKING:
    from .session import Grid, Session


class Evaluation:
    """One evaluation of the model: a step, a layout, and the plan for its grid.

    All of PARO's own work in a call runs in `session.lasting()`, since much of what it allocates outlives the call:
    sums, patterns, lists, biases, tables and scratch memory. Only the result is the host's, and allocated
    outside, like what `dense` allocates.
    """

    def __init__(self, session: Session, layout: TokenLayout, grid: Grid, step: int, attempt: Attempt) -> None:
        self.session = session
        self.layout = layout
        self.step = step
        self._grid = grid
        self._attempt = attempt

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
        plain: bool = False,
        blocks: int | None = None,
    ) -> torch.Tensor:
        """Attention of one site: sparse where the plan and the schedule say so, else `dense()`.

        q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]` -> `[B, Hq, L, D]` in q's dtype. key_bias additive `[B, L]`.
        dense runs the host's own function; plain: that is torch's attention and nothing else. blocks: how many
        transformer blocks there are, for negative block numbers.
        Trouble of PARO's own never ends the run (unless `strict`): the call is answered by `dense()`.
        """
        session, grid, attempt = self.session, self._grid, self._attempt
        reason = session.unsuitable_reason(self.layout.grid_tokens, q)
        if reason is not None:
            attempt.count("passed", reason)
            return dense()
        session.device = str(q.device)
        if plain and key_bias is None and session.settings.dense_attention == "auto":
            dense = partial(in_16_bits, q, k, v, scale, dense)
        watched = session.calibrator is not None
        too_short = None if watched else session.too_short_to_drop(self.layout.grid_tokens, q.device)
        if too_short is not None and not self._wants_dense(q, too_short):
            self._meet(site)
            attempt.count("dense", too_short)
            return dense()
        with session.lasting():
            reason = session.not_ready_reason(q, k, self.layout, self.step, key_bias is not None)
        if reason is not None and reason != COMPILING:
            attempt.count("passed", reason)
            return dense()
        self._meet(site)
        if reason is not None:
            attempt.count("dense", reason)
            return dense()
        if session.calibrator is not None:
            self._observe(session.calibrator, site, q, k, v, scale, key_bias, self._calibrates())
            attempt.count("dense", "calibrating")
            return dense()
        if too_short is not None:
            attempt.count("dense", too_short)
            return self._dense(q, k, v, scale, key_bias, dense, wanted=True)
        if session.schedule.is_dense_block(site.block_index, blocks):
            session.dense_block_sites.add(site)
            attempt.count("dense", "dense block")
            return self._dense(q, k, v, scale, key_bias, dense)
        seen = grid.plan is None and self._observe(grid.calibrator, site, q, k, v, scale, key_bias, self._calibrates())
        if grid.plan is None and grid.calibrator is None:
            attempt.count("fallbacks", lost := grid.lost or "no plan and calibration is off")
            if session.settings.strict:
                raise RuntimeError(f"strict: {words_of(lost)}; {hint_of(lost)}")
            return self._dense(q, k, v, scale, key_bias, dense)
        if session.schedule.is_dense_step(self.step):
            attempt.count("dense", "dense step")
            return self._dense(q, k, v, scale, key_bias, dense)
        if grid.plan is None and not (seen and self._plan_alone(site)):
            attempt.count("dense", "no plan yet")
            return self._dense(q, k, v, scale, key_bias, dense)
        why_not = session.off_sites.get(site)
        if why_not is None and site not in self._plan.sites:
            why_not = f"{site.name} is not in the plan"
        if why_not is None:
            attempt.save_once()
            out = self._sparse(site, q, k, v, scale, key_bias)
            if out is not None:
                return out
            why_not = session.off_sites[site]
        attempt.count("fallbacks", why_not)
        return dense()

    def abandon(self, reason: str) -> None:
        """The evaluation's sites were not what they seemed: its grid's plan and observations are dropped, and the rest
        of the run on this grid keeps every block. Raises RuntimeError with `strict`."""
        if self.session.settings.strict:
            raise RuntimeError(reason)
        with self.session.lock:
            self._grid.plan = self._grid.begun = self._grid.calibrator = self._grid.seen_step = None
            self._grid.source = "none"
            self._grid.lost = f"no plan: it was dropped, {reason}"
            self.session.patterns.clear()
            self.session.note(reason)

    def end(self, attempt: int = 0) -> bool:
        """See `Attempt.end`."""
        return self._attempt.end(attempt)

    def _meet(self, site: Site) -> None:
        self.session.sites.add(site)
        self._grid.sites.add(site)

    @property
    def _plan(self) -> Plan | None:
        """The grid's, or what there is of it in the step that makes it."""
        return self._grid.begun if self._grid.plan is None else self._grid.plan

    @property
    def _group(self) -> int:
        """The group of sparse steps, of those its grid's plan has, that this step belongs to."""
        return self.session.schedule.group(self.step, self._plan.groups)

    def _calibrates(self) -> bool:
        session, grid = self.session, self._grid
        if session.calibrator is not None:
            return session.calibrate_steps is None or self.step in session.calibrate_steps
        return grid.calibrator is not None and self.step >= session.schedule.dense_steps - 1

    def _observe(self, calibrator, site, q, k, v, scale, key_bias, wanted: bool) -> bool:
        """Whether the call was observed."""
        if not wanted or not self._attempt.sound():
            return False
        session = self.session
        rest = {"step": self.step, "scale": scale, "key_bias": key_bias, "backend": session.backend}
        began = time.perf_counter()
        try:
            with session.lasting():
                calibrator.observe(site, self.layout, q, k, v, **rest)
        except Exception as error:
            if session.settings.strict or session.calibrator is not None:
                raise
            self._attempt.count("fallbacks", f"calibration of {site.name}: {one_line(error)}")
            return False
        with session.lock:
            if calibrator is self._grid.calibrator:
                self._grid.seen_step = self.step
            session.calibration_seconds += time.perf_counter() - began
        return True

    def _plan_alone(self, site: Site) -> bool:
        """Whether the site has, in a step that needs no dense attention but finds no plan, masks of its own from what
        was just observed."""
        session, grid = self.session, self._grid
        if grid.begun is not None and site in grid.begun.sites:
            return True
        began = time.perf_counter()
        try:
            with session.lasting():
                alone = grid.calibrator.plan_of(site, session.schedule.group(self.step, GROUPS))
        except Exception as error:
            if session.settings.strict:
                raise
            session.note(f"{site.name} has no plan of its own: {one_line(error)}")
            return False
        with session.lock:
            sites = {} if grid.begun is None else grid.begun.sites
            grid.begun = replace(alone, sites={**sites, **alone.sites})
            session.calibration_seconds += time.perf_counter() - began
        return True

    def _wants_dense(self, q: torch.Tensor, too_short: str | None = None) -> bool:
        """Whether PARO's kernel is to do calls that keep every block: where the user says so, or it is the faster."""
        wanted = self.session.settings.dense_attention
        if wanted != "auto":
            return wanted == "paro"
        if too_short is not None:
            return paro_pays_when_short(q.device)
        # 8-bit products cost nothing in a first step of pure noise, and fidelity in later ones (docs/method.md).
        cheap = self.step == 0 and self.session.from_noise and self.session.settings.preset != "quality"
        return cheap and paro_is_faster(q, self.session.precision)

    def _dense(self, q, k, v, scale, key_bias, dense, wanted: bool | None = None) -> torch.Tensor:
        """A call that keeps every block, by PARO's kernel at density 1 or the host's attention."""
        if not (self._wants_dense(q) if wanted is None else wanted) or self.session.dense_off:
            return dense()
        out = self._guarded(None, q, k, v, scale, key_bias)
        return dense() if out is None else out

    def _sparse(self, site, q, k, v, scale, key_bias) -> torch.Tensor | None:
        out = self._guarded(site, q, k, v, scale, key_bias)
        if out is not None:
            self._attempt.count_sparse(site)
        return out

    def _measures(self, site: Site, q: torch.Tensor) -> bool:
        """Whether the tail of this site is due to be measured anew in this step. Asked at least once in every call."""
        session, key = self.session, (site, self.layout.grid)
        # Masks that each site has by itself hold for this step only, with what calibration tells.
        if session.refresh is None or self._grid.plan is None or self._plan.sites[site].tail_bias is None:
            return False
        return session.refresh.due(key, self.step, self._group, is_short(q))

    def _pattern(self, site: Site, q, k, scale, key_bias) -> SparsePattern:
        """The site's pattern in this step; where its plan has no masks, with one that is measured on this call, if none
        of this group of steps is at hand."""
        session, plan, group = self.session, self._plan, self._group
        heads = len(plan.sites[site].orders)
        if heads != q.shape[1]:
            raise PlanError(f"plan: made for {heads} heads, the call has {q.shape[1]}")

        def measure(pattern: SparsePattern) -> torch.Tensor:
            began = time.perf_counter()
            rest = {"scale": scale, "key_bias": key_bias, "backend": session.backend}
            bits = routed_bits(plan.sites[site], group, q, k, pattern, **rest)
            with session.lock:
                session.routed_sites.add(site)
                session.tail_seconds += time.perf_counter() - began
            return bits

        return session.patterns.get(site, plan, group, self.layout, k.shape[1], q.device, measure)

    def _observe_bias(self, site: Site, q, k, v, pattern, scale, key_bias) -> BiasObservation | None:
        """Measure the bias of the site's tail where it is due."""
        session = self.session
        if not self._measures(site, q):
            return None
        began = time.perf_counter()
        rest = {"scale": scale, "key_bias": key_bias, "backend": session.backend}
        seen = session.refresh.measure((site, self.layout.grid), self.step, q, k, v, pattern, **rest)
        session.tail_seconds += time.perf_counter() - began
        return seen

    def _guarded(self, site: Site | None, q, k, v, scale, key_bias) -> torch.Tensor | None:
        """Run PARO's kernel for a planned site, or dense for None. Returns None after noting why it could not."""
        session = self.session
        try:
            # The result is the host's: see the class.
            out = empty_output(q)
            with session.lasting():
                out = self._run(site, q, k, v, scale, key_bias, out)
            if out is not None:
                return out
            reason = not_finite(site)
            if session.settings.strict:
                raise FloatingPointError(reason)
        except Exception as error:
            if session.settings.strict:
                raise
            if isinstance(error, (torch.OutOfMemoryError, ScratchOutOfMemory)):
                # The host's attention comes next and needs the memory.
                with session.lasting():
                    release_scratch()
                    torch.cuda.empty_cache()
            reason = f"{site.name if site else 'dense attention'}: {one_line(error)}"
        if site is None:
            self._attempt.count("fallbacks", reason)
        else:
            session.off_sites[site] = reason
        return None

    def _run(self, site: Site | None, q, k, v, scale, key_bias, out: torch.Tensor) -> torch.Tensor | None:
        """What `_guarded` guards: the result, in `out`; None if it is not finite."""
        session = self.session
        if site is None:
            pattern = dense_pattern(self.layout, q.shape[1], k.shape[1], q.device)
        else:
            pattern = self._pattern(site, q, k, scale, key_bias)
            key, refresh = (site, self.layout.grid), session.refresh
            seen = self._observe_bias(site, q, k, v, pattern, scale, key_bias)
            pattern = with_bias(pattern, None if refresh is None else refresh.bias(key))
        rotate = site is not None and self._plan.sites[site].rotate and session.readiness.late_ready
        sizes = (pattern.geometry.block_q, None if pattern.tail_bias is None else pattern.pool)
        precision = site_precision(session.precision, rotate, q, session.backend, *sizes)
        flag = self._attempt.flag(q.device)
        rest = {"scale": scale, "key_bias": key_bias, "nonfinite": flag.on_device, "backend": session.backend}
        out = run_kernel(q, k, v, pattern, precision, out=out, **rest)
        if not self._attempt.finite(site, flag):
            return None
        if site is not None and seen is not None:
            refresh.judge(key, self.step, seen, out)
        return out


def one_line(error: Exception) -> str:
    """Kind and first line of an error, for people."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
