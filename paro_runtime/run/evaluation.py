"""One evaluation of the model within a run: every self-attention call is answered here.

The way of one sparse call, in this file unless another is named:

1. The host's call reaches `host/override.py`. Where it is self-attention over the layout's tokens, which a claim says,
   it comes to `Evaluation.attend` with its site, as `[B, H, L, D]`; `dense` runs what would have run without PARO.
2. `_why_no_claim` and `_why_no_plan` say why the call keeps every block, if it does, in this order: PARO cannot serve
   it, the grid is short, kernels are being compiled, it is only observed, its block is kept dense, there is no plan
   yet, this step is dense, the site is at fault. Reasons are counted; `_dense` answers.
3. Else `_run_sparse`. `_pattern`: the plan's orders as tables and the kept blocks as bits, on the device; where the
   plan has no masks, `routed_bits` finds this call's in the first step of a group of steps. `_observe_bias`: in that
   step the tail's bias is measured on some of the call's rows, with their exact output.
4. `_launch`: the precision, rotated or not, and a flag that the kernel raises if the result is not finite. Then
   `kernels/attention/api.py` checks the call and asks `kernels/core/dispatch.py` what serves it, and
   `kernels/attention/launch.py` does the heads in pieces that fit scratch memory: `prepare` reorders, quantises and
   pools K and V, `forward` takes Q and writes the result in the model's own order.
5. Back in `_run_sparse` the result is compared with the exact rows. It goes to the host; where PARO failed or the
   result is not finite, `dense` answers, and the site is dense from then on. If the evaluation can be made again, its
   flags are read at its end (`Attempt.end`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...kernels.attention.api import sparse_attention as run_kernel
from ...kernels.core.inputs import ScoreInputs
from ...kernels.core.layout import TokenLayout
from ...kernels.core.pattern import SparsePattern, empty_output
from ...kernels.core.scratch import ScratchOutOfMemory, release_scratch
from ..attention.dense import dense_pattern, in_16_bits, paro_is_faster, paro_pays_when_short
from ..attention.patterns import with_bias
from ..calibration.calibrator import Calibrator
from ..calibration.tail_fit import BiasObservation
from ..compiling.readiness import COMPILING
from ..compiling.self_check import site_precision
from ..plan.options import GROUPS
from ..plan.plan import PlanError, Site
from ..report.reasons import hint_of, words_of
from .attempt import Attempt, not_finite
from .grid_run import GridRun
from .masks import routed_bits
from .tail_bias import is_short

if TYPE_CHECKING:
    from .session import Session


@dataclass(frozen=True, eq=False)
class SiteCall(ScoreInputs):
    """One attention call: v like k; dense runs the host's own attention of the same."""

    v: torch.Tensor
    site: Site
    dense: Callable[[], torch.Tensor]


Run = Callable[[SiteCall, torch.Tensor], torch.Tensor | None]
"""Computes a call into the tensor it is given; None if the result is not finite."""


class WhyDense(NamedTuple):
    """Why a call keeps every block; kind is the name of a field of `Counts`. by_paro: whether PARO's kernel is to do
    it, None: where that is the faster or the user says so."""

    kind: str
    reason: str
    by_paro: bool | None = False


class Evaluation:
    """One evaluation of the model: a step, a layout, and the plan for its grid.

    All of PARO's own work in a call runs in `session.lasting()`, since much of what it allocates outlives the call:
    observations, patterns, lists, biases, tables and scratch memory. Only the result is the host's, and allocated
    outside, like what `dense` allocates.
    """

    def __init__(self, session: Session, layout: TokenLayout, grid: GridRun, step: int, attempt: Attempt) -> None:
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
        session = self.session
        reason = session.unsuitable_reason(self.layout.grid_tokens, q)
        if reason is not None:
            self._attempt.count("passed", reason)
            return dense()
        session.log.device = str(q.device)
        if plain and key_bias is None and session.settings.dense_attention == "auto":
            dense = partial(in_16_bits, q, k, v, scale, dense)
        call = SiteCall(q, k, v, site, dense, scale=scale, key_bias=key_bias)
        why = self._why_no_claim(call, blocks) or self._why_no_plan(call)
        if why is None:
            out = self._sparse(call)
            if out is not None:
                return out
            why = WhyDense("fallbacks", session.log.off_sites[site])
        self._attempt.count(why.kind, why.reason)
        if why.kind == "fallbacks" and session.settings.strict:
            raise RuntimeError(f"strict: {words_of(why.reason)}; {hint_of(why.reason)}")
        return self._dense(call, why.by_paro)

    def _why_no_claim(self, call: SiteCall, blocks: int | None) -> WhyDense | None:
        """Why the call keeps every block whatever the grid's plan says, or None. Observes it for PARO Calibrate."""
        session, q, tokens = self.session, call.q, self.layout.grid_tokens
        too_short = None if session.calibrator is not None else session.too_short_to_drop(tokens, q.device)
        if too_short is not None and not self._wants_dense(q, too_short):
            self._meet(call.site)
            return WhyDense("dense", too_short)
        with session.lasting():
            reason = session.not_ready_reason(q, call.k, self.layout, self.step, call.key_bias is not None)
        if reason is not None and reason != COMPILING:
            return WhyDense("passed", reason)
        self._meet(call.site)
        if reason is not None:
            return WhyDense("dense", reason)
        if session.calibrator is not None:
            self._observe(session.calibrator, call)
            return WhyDense("dense", "calibrating")
        if too_short is not None:
            return WhyDense("dense", too_short, by_paro=True)
        if session.schedule.is_dense_block(call.site.block_index, blocks):
            session.log.dense_block_sites.add(call.site)
            return WhyDense("dense", "dense block", by_paro=None)
        return None

    def _why_no_plan(self, call: SiteCall) -> WhyDense | None:
        """Why the grid's plan does not serve this call, or None. Observes it where there is no plan yet."""
        session, grid, site = self.session, self._grid, call.site
        seen = grid.plan is None and self._observe(grid.calibrator, call)
        if grid.plan is None and grid.calibrator is None:
            return WhyDense("fallbacks", grid.lost or "no plan and calibration is off", by_paro=None)
        if session.schedule.is_dense_step(self.step):
            return WhyDense("dense", "dense step", by_paro=None)
        if grid.plan is None and not (seen and self._plan_alone(site)):
            return WhyDense("dense", "no plan yet", by_paro=None)
        if site in session.log.off_sites:
            return WhyDense("fallbacks", session.log.off_sites[site])
        if site not in grid.present_plan.sites:
            return WhyDense("fallbacks", f"{site.name} is not in the plan")
        return None

    def abandon(self, reason: str) -> None:
        """The evaluation's sites were not what they seemed: its grid's plan and observations are dropped, and the rest
        of the run on this grid keeps every block. Raises RuntimeError with `strict`."""
        if self.session.settings.strict:
            raise RuntimeError(reason)
        with self.session.lock:
            self._grid.drop(f"no plan: it was dropped, {reason}")
            self.session.patterns.clear()
            self.session.log.note(reason)

    def end(self, attempt: int = 0) -> bool:
        """See `Attempt.end`."""
        return self._attempt.end(attempt)

    def _meet(self, site: Site) -> None:
        self.session.log.sites.add(site)
        self._grid.sites.add(site)

    @property
    def _group(self) -> int:
        """The group of sparse steps, of those its grid's plan has, that this step belongs to."""
        return self.session.schedule.group(self.step, self._grid.present_plan.groups)

    def _calibrates(self) -> bool:
        session, grid = self.session, self._grid
        if session.calibrator is not None:
            return session.calibrate_steps is None or self.step in session.calibrate_steps
        return grid.calibrator is not None and self.step >= session.schedule.dense_steps - 1

    def _options(self, call: SiteCall) -> dict:
        """What every kernel is told of a call beside q, k and v."""
        return {"scale": call.scale, "key_bias": call.key_bias, "backend": self.session.log.backend}

    def _observe(self, calibrator: Calibrator | None, call: SiteCall) -> bool:
        """Whether the call was observed."""
        if not self._calibrates() or not self._attempt.sound():
            return False
        session = self.session
        try:
            with session.lasting(), session.log.timed("calibration"):
                inputs = (call.site, self.layout, call.q, call.k, call.v)
                calibrator.observe(*inputs, step=self.step, **self._options(call))
        except Exception as error:
            if session.settings.strict or session.calibrator is not None:
                raise
            self._attempt.count("fallbacks", f"calibration of {call.site.name}: {one_line(error)}")
            return False
        with session.lock:
            if calibrator is self._grid.calibrator:
                self._grid.seen_step = self.step
        return True

    def _plan_alone(self, site: Site) -> bool:
        """Whether the site has, in a step that needs no dense attention but finds no plan, masks of its own from what
        was just observed."""
        session, grid = self.session, self._grid
        if grid.begun is not None and site in grid.begun.sites:
            return True
        try:
            with session.lasting(), session.log.timed("calibration"):
                alone = grid.calibrator.plan_of(site, session.schedule.group(self.step, GROUPS))
        except Exception as error:
            if session.settings.strict:
                raise
            session.log.note(f"{site.name} has no plan of its own: {one_line(error)}")
            return False
        with session.lock:
            sites = {} if grid.begun is None else grid.begun.sites
            grid.begun = replace(alone, sites={**sites, **alone.sites})
        return True

    def _wants_dense(self, q: torch.Tensor, too_short: str | None = None) -> bool:
        """Whether PARO's kernel is to do calls that keep every block: where the user says so, or it is the faster."""
        wanted = self.session.settings.dense_attention
        if wanted != "auto":
            return wanted == "paro"
        if too_short is not None:
            return paro_pays_when_short(q.device)
        # 8-bit products cost nothing in a first step of pure noise, and fidelity in later ones (docs/method.md).
        cheap = self.step == 0 and self.session.course.from_noise and self.session.settings.preset != "quality"
        return cheap and paro_is_faster(q, self.session.log.precision)

    def _dense(self, call: SiteCall, by_paro: bool | None) -> torch.Tensor:
        """A call that keeps every block, by PARO's kernel at density 1 or the host's attention."""
        if by_paro is None:
            by_paro = self._wants_dense(call.q)
        if not by_paro or self.session.log.dense_off:
            return call.dense()
        out = self._guarded(None, call, self._run_dense)
        return call.dense() if out is None else out

    def _sparse(self, call: SiteCall) -> torch.Tensor | None:
        """A call by the plan; None after noting why it could not be, and never again for this site."""
        self._attempt.save_once()
        out = self._guarded(call.site, call, self._run_sparse)
        if out is not None:
            self._attempt.count_sparse(call.site)
        return out

    def _guarded(self, site: Site | None, call: SiteCall, run: Run) -> torch.Tensor | None:
        """The result of `run`; None after noting why there is none. site: whose fault that would be, None: of dense
        attention."""
        session = self.session
        try:
            # The result is the host's: see the class.
            out = empty_output(call.q)
            with session.lasting():
                out = run(call, out)
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
            session.log.off_sites[site] = reason
        return None

    def _run_dense(self, call: SiteCall, out: torch.Tensor) -> torch.Tensor | None:
        pattern = dense_pattern(self.layout, call.q.shape[1], call.k.shape[1], call.q.device)
        return self._launch(None, call, pattern, out)

    def _run_sparse(self, call: SiteCall, out: torch.Tensor) -> torch.Tensor | None:
        """See 3 to 5 above."""
        update, key = self.session.refresh, (call.site, self.layout.grid)
        pattern = self._pattern(call)
        seen = self._observe_bias(call, pattern)
        pattern = with_bias(pattern, None if update is None else update.bias(key))
        out = self._launch(call.site, call, pattern, out)
        if out is not None and seen is not None:
            update.judge(key, self.step, seen, out)
        return out

    def _pattern(self, call: SiteCall) -> SparsePattern:
        """The site's pattern in this step; where its plan has no masks, with one that is measured on this call, if none
        of this group of steps is at hand."""
        session, plan, group, site = self.session, self._grid.present_plan, self._group, call.site
        heads = len(plan.sites[site].orders)
        if heads != call.q.shape[1]:
            raise PlanError(f"plan: made for {heads} heads, the call has {call.q.shape[1]}")

        def measure(pattern: SparsePattern) -> torch.Tensor:
            with session.log.timed("tail"):
                bits = routed_bits(plan.sites[site], group, call, pattern, session.log.backend)
            with session.lock:
                session.log.routed_sites.add(site)
            return bits

        return session.patterns.get(site, plan, group, self.layout, call.k.shape[1], call.q.device, measure)

    def _observe_bias(self, call: SiteCall, pattern: SparsePattern) -> BiasObservation | None:
        """Measure the bias of the site's tail where it is due. Asked in every sparse call."""
        session, key = self.session, (call.site, self.layout.grid)
        # Masks that each site has by itself hold for this step only, with what calibration tells.
        if session.refresh is None or self._grid.plan is None or self._grid.plan.sites[call.site].tail_bias is None:
            return None
        if not session.refresh.due(key, self.step, self._group, is_short(call.q)):
            return None
        with session.log.timed("tail"):
            return session.refresh.measure(key, self.step, call, call.v, pattern, session.log.backend)

    def _launch(
        self, site: Site | None, call: SiteCall, pattern: SparsePattern, out: torch.Tensor
    ) -> torch.Tensor | None:
        """The result, in `out`; None if it is known not to be finite. site: None for dense attention."""
        session, q, log = self.session, call.q, self.session.log
        pool = None if pattern.tail_bias is None else pattern.pool
        marked = site is not None and self._grid.present_plan.sites[site].rotate and session.readiness.late_ready
        sizes = (pattern.geometry.block_q, pool)
        precision, unrotated = site_precision(log.precision, marked and session.rotates, q, log.backend, *sizes)
        if unrotated is not None:
            session.rotates = False  # and not asked again: from here on all steps of a run are alike
            log.note(f"queries and keys are not rotated where the plan wants it: {unrotated}")
        flag = self._attempt.flag(q.device)
        options = {**self._options(call), "nonfinite": flag.on_device, "out": out}
        out = run_kernel(q, call.k, call.v, pattern, precision, **options)
        return out if self._attempt.finite(site, flag) else None


def one_line(error: Exception) -> str:
    """Kind and first line of an error, for people."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
