"""The life of one run inside ComfyUI: OUTER_SAMPLE begins and ends it, APPLY_MODEL is one evaluation of the model.

Two wrappers on a clone of the model. All state of a run hangs on the run's own copy of the model options, which the
host makes for every sampling and drops at its end; here it is dropped as well, exceptions and cancelling included.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...kernels.core.layout import TokenLayout
from ..report.reasons import not_used, stopped
from ..report.report import Report
from ..report.sentences import joined
from ..run.session import Session
from ..run.ulysses import several_ranks
from . import saved
from .claims import OPTIONS_KEY, HostEvaluation
from .families import Family, ModelCall
from .identity import mark_of
from .standing import KEY, others_around, stand_around, stand_first

log = logging.getLogger("paro")

APPLY_MODEL: dict[str, Any] = {
    "x": None, "t": None, "c_concat": None, "c_crossattn": None, "control": None, "transformer_options": {},
}  # fmt: skip
"""APPLY_MODEL's arguments before those that only some models take, and what the host gives where they are left out."""

ATTEMPTS = 4
"""Times one evaluation is run at most when its results are not finite."""

NOT_RUN = "PARO has not run yet: sample with this model first"

KEPT_REPORTS = 16
"""Runs of one patched model whose reports are kept: a workflow may sample with it several times."""


class HostRun:
    """One sampling of one model: its session and family, carried by `transformer_options` between evaluations."""

    def __init__(
        self, session: Session, family: Family, guider: Any = None, lifecycle: Lifecycle | None = None
    ) -> None:
        """guider: the host's, whose model is sampled. lifecycle: of that model."""
        self.session = session
        self.family = family
        self.lifecycle = lifecycle
        self._guider = guider
        self._sigmas: Any = None
        self._compiled_anew = False
        self._beside: dict[Any, HostRun | None] = {}
        self._lock = threading.Lock()

    @property
    def beside(self) -> list[HostRun]:
        """The runs of other models within this sampling."""
        return [run for run in self._beside.values() if run is not None]

    def of(self, model: Any) -> HostRun | None:
        """The run of the model that is evaluated: this one; one beside it; None for a model without PARO.

        The host calls two kinds of other models with this one's options. Its copies on other GPUs, each in a thread of
        its own, have a session each: what one of them measures is on its own device, and the order in which they come
        must change nothing. A guider's second model has one where it was patched too.
        """
        patcher = getattr(self._guider, "model_patcher", None)
        if patcher is None or patcher.model is model:
            return self
        with self._lock:
            if model not in self._beside:
                self._beside[model] = None  # whatever goes wrong is tried once
                self._beside[model] = self._begin_beside(model)
            return self._beside[model]

    def _begin_beside(self, model: Any) -> HostRun | None:
        copies = (getattr(self._guider, "model_options", None) or {}).get("multigpu_clones", {})
        is_copy = any(copy.model is model for copy in copies.values())
        attached = getattr(getattr(model, "current_patcher", None), "get_attachment", lambda _: None)
        its = self.lifecycle if is_copy else attached(KEY)
        if not isinstance(its, Lifecycle):
            return None
        its.last_report = None
        session = its.start(self.session.sigmas, getattr(model, "current_patcher", None))
        session.quiet = is_copy
        return HostRun(session, its.family, lifecycle=its)

    def compiles_anew(self, evaluation: HostEvaluation, options: dict[str, Any]) -> bool:
        """Whether the evaluation is to be made again because a graph left PARO out: once in a run.

        A model that was compiled in a run without PARO keeps that graph, since the host's compile node drops every
        guard on `transformer_options`. All graphs are dropped, and compiled again when they are called next.
        """
        kinds = options.get("wrappers", {})
        compiled = any("torch.compile" in kinds.get(kind, {}) for kind in ("apply_model", "diffusion_model"))
        if self._compiled_anew or not evaluation.saw_nothing or not compiled:
            return False
        self._compiled_anew = True
        self.session.log.note("the model had been compiled without PARO: it is compiled anew")
        torch.compiler.reset()
        return True

    def begin(
        self, model: Any, args: Sequence[Any], extra: dict[str, Any], can_redo: bool = False
    ) -> HostEvaluation | None:
        """Begin an evaluation with APPLY_MODEL's arguments; None, with the reason counted, where PARO has no part.

        can_redo: it will be run once more if need be.
        """
        x, sigma, _, context, _, options = args
        call = ModelCall(tuple(x.shape), None if context is None else tuple(context.shape), extra, options)
        layouts = self.family.layout(model, call)
        if isinstance(layouts, str):
            self.session.decline(layouts)
            return None
        layouts = (layouts,) if isinstance(layouts, TokenLayout) else layouts
        if self.session.calibrator is not None:
            # A plan is for one grid; of a model with several the first is the largest.
            layouts = [layout for layout in layouts if layout.grid == layouts[0].grid]
        counts = self.family.counts(model)
        uncountable = None if counts is None else self.family.uncountable(call)
        self._follow(options.get("sample_sigmas"))
        sigma = float(sigma.flatten()[0])
        attempt = self.session.attempt(can_redo)
        evaluations = (self.session.begin(layout=layout, sigma=sigma, attempt=attempt) for layout in layouts)
        return HostEvaluation(attempt, self.family, *evaluations, counts=counts, uncountable=uncountable)

    def _follow(self, sigmas: Any) -> None:
        """Take over the noise levels that this evaluation is said to be one of, where they are not the run's: a sampler
        with a schedule of its own puts it there."""
        if sigmas is self._sigmas or not isinstance(sigmas, torch.Tensor) or sigmas.dim() != 1 or len(sigmas) < 2:
            return
        self._sigmas = sigmas
        levels = sigmas.tolist()
        if levels != self.session.sigmas and all(map(math.isfinite, levels)):
            self.session.follow(levels)


class Lifecycle:
    """The two wrappers of one patched model.

    start     makes the session of a run from its sigmas (the final one included) and the host's patcher that is sampled
              (None: not known), which may be a later clone of the patched one, with other nodes on it.
    strict    trouble at the end of a run is an error, not a line in the log.
    on_status gets the line that a run without a report leaves on the node.
    """

    def __init__(
        self,
        family: Family,
        start: Callable[[list[float], Any], Session],
        strict: bool = False,
        on_status: Callable[[str], None] | None = None,
    ) -> None:
        self.family = family
        self.strict = strict
        self.start = start
        self._show = on_status or (lambda text: None)
        self.last_report: Report | None = None
        self.why_no_report = NOT_RUN
        self._reports: dict[Hashable, Report] = {}

    def report_of(self, samples: Any) -> Report | None:
        """The report of the run that made this latent, or of the last one where it is not known again."""
        mark = mark_of(samples)
        return self.last_report if mark is None else self._reports.get(mark, self.last_report)

    def knows(self, samples: Any) -> bool:
        """Whether it is known which run made this latent."""
        return mark_of(samples) in self._reports

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of OUTER_SAMPLE: (noise, latent_image, sampler, sigmas, ...), owner the guider."""
        self.last_report = None
        try:
            sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
            options = executor.class_obj.model_options.setdefault("transformer_options", {})
            patcher = getattr(executor.class_obj, "model_patcher", None)
            session = self.start([float(sigma) for sigma in sigmas], patcher)
            run = options[OPTIONS_KEY] = HostRun(session, self.family, executor.class_obj, self)
            stand_first(options)
        except Exception as error:
            if self.strict:
                raise
            log.error("PARO: the run goes on without it, it could not begin", exc_info=error)
            self._no_report(not_used(f"the run could not begin ({type(error).__name__}: {error})"))
            return executor(*args, **kwargs)
        try:
            result = executor(*args, **kwargs)
        except BaseException:
            for each in (run, *run.beside):
                each.lifecycle._stop(each.session)
            raise
        finally:
            options.pop(OPTIONS_KEY, None)
        try:
            self._conclude(run, result)
        except Exception as error:
            # The pictures are made.
            if self.strict:
                raise
            self._lost(error)
        return result

    def _conclude(self, run: HostRun, result: Any) -> None:
        """The reports of a run that gave this result, and of those beside it."""
        for each in run.beside:
            its = each.lifecycle
            report = its._finish(each.session)
            if its is self:
                run.session.absorb(each.session)
            else:
                its._keep(report, result)
        self._keep(self._finish(run.session), result)

    def _keep(self, report: Report | None, result: Any) -> None:
        """The report is that of the run that gave this result."""
        self.last_report = report
        mark = mark_of(result)
        if report is not None and mark is not None:
            self._reports.pop(mark, None)
            self._reports[mark] = report
            for oldest in list(self._reports)[:-KEPT_REPORTS]:
                del self._reports[oldest]

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Wrapper of APPLY_MODEL: (x, t, c_concat, c_crossattn, control, transformer_options), owner the model."""
        # Another node's wrapper may have turned some of them into keywords.
        bound = {**APPLY_MODEL, **dict(zip(APPLY_MODEL, args, strict=False))}
        bound |= {name: kwargs[name] for name in APPLY_MODEL if name in kwargs}
        run = (bound["transformer_options"] or {}).get(OPTIONS_KEY)
        if not isinstance(run, HostRun):
            return executor(*args, **kwargs)
        its = self._or(None, run, "the beginning of a run beside another", run.of, executor.class_obj)
        if its is None:
            run.session.decline("an evaluation of another model than the one that was patched")
            return executor(*args, **kwargs)
        run = its
        extra = {name: value for name, value in kwargs.items() if name not in APPLY_MODEL}
        model, given = executor.class_obj.diffusion_model, bound["transformer_options"]
        can_redo = self._or(False, run, "looking at what stands around the model", repeatable, model, given)
        # Results that are not finite are found at the end, for all calls at once: the sites at fault are dense the next
        # time, and the last time PARO stays out of it.
        for number in range(ATTEMPTS):
            evaluation = None
            if number < ATTEMPTS - 1:
                evaluation = self._begin(run, model, tuple(bound.values()), extra, can_redo)
            else:
                run.session.decline(f"an evaluation whose results were not finite {number} times")
            # Always a new dict: the host hands the same one to every evaluation of a step.
            options = {**given, OPTIONS_KEY: evaluation}
            if evaluation is not None:
                self._or(None, run, "standing before another attention", stand_around, evaluation, options)
            control = bound["control"]  # what another node gives in place of a dict goes on as it is
            control = self._or(control, run, "copying a control net's results", _copied, control)
            passed = {**bound, "control": control, "transformer_options": options}
            result = executor(*passed.values(), *args[len(APPLY_MODEL) :], **extra)
            anew = evaluation is not None and can_redo
            if anew and self._or(False, run, "looking for a graph without PARO", run.compiles_anew, evaluation, given):
                continue
            if evaluation is None or not self._end(evaluation, number):
                break
        return result

    def _or(self, otherwise: Any, run: HostRun, where: str, ask: Callable[..., Any], *given: Any) -> Any:
        """What `ask` returns of what is given; `otherwise` if it raises, which is logged. Raises it with `strict`."""
        try:
            return ask(*given)
        except Exception as error:
            if self.strict:
                raise
            run.session.log.log_once(where, error)
            return otherwise

    def _end(self, evaluation: HostEvaluation, number: int) -> bool:
        try:
            return evaluation.end(number)
        except Exception as error:
            if self.strict:
                raise
            evaluation.trouble("the end of an evaluation", error)
            return False

    def _begin(
        self, run: HostRun, model: Any, args: tuple, extra: dict[str, Any], can_redo: bool
    ) -> HostEvaluation | None:
        try:
            return run.begin(model, args, extra, can_redo)
        except Exception as error:
            # A model that another node changed beyond recognition runs dense; it does not fail.
            if self.strict:
                raise
            run.session.log.log_once("the beginning of an evaluation", error)
            run.session.decline(f"the token layout could not be read ({type(error).__name__}: {error})")
            return None

    def _stop(self, session: Session) -> None:
        """The sampling was cancelled or failed: there is no report, and the node says so."""
        if not session.quiet:
            self._no_report(stopped(session.log.clock.step, session.steps))

    def _finish(self, session: Session) -> Report | None:
        try:
            report = session.finish()
            if session.quiet:  # of a copy on another GPU: the run's own report is of all copies
                return report
            log.info("PARO: %s", report.status())
            made_with = saved.add(report, session.policy.identity)
            if made_with is not None:
                report = replace(report, notes=[*report.notes, made_with])
                session.say(joined("\n", (report.status(), made_with)))
                log.info("PARO: %s", made_with)
            # It lives as long as the patched model, which may be for days.
            return report if report.plan is None else replace(report, plan=report.plan.without_masks())
        except Exception as error:
            # The pictures are made; nothing that goes wrong afterwards may cost them.
            if self.strict:
                raise
            self._lost(error)
            return None

    def _lost(self, error: Exception) -> None:
        self._no_report(f"The run's report could not be made ({type(error).__name__}: {error})", logging.WARNING)

    def _no_report(self, why: str, level: int = logging.INFO) -> None:
        """The same sentence for the report, the console and the node."""
        self.why_no_report = why
        log.log(level, "PARO: %s", why)
        try:
            self._show(why)
        except Exception as error:  # what ended the sampling, or the pictures, are what the user must see
            log.warning("PARO: the status could not be shown (%s: %s)", type(error).__name__, error)


def repeatable(model: Any, options: dict[str, Any]) -> bool:
    """Whether an evaluation may be run again as if it had not been: nothing of another node's stands around the model
    that might count evaluations or remember the one before, as caches of steps do.

    The host's wrapper for compiled models remembers nothing. Methods replaced on the model itself (its `vars`) may.
    Where other processes share the work, none may make an exchange that the others do not.
    """
    if several_ranks():
        return False
    model = getattr(model, "_orig_mod", model)
    replaced = any(callable(value) and hasattr(type(model), name) for name, value in vars(model).items())
    return not replaced and not others_around(options)


def _copied(control: dict[str, Any] | None) -> dict[str, Any] | None:
    """A control net's results, to be used up: a U-Net takes them out of their lists."""
    if control is None:
        return None
    return {name: list(found) if isinstance(found, list) else found for name, found in control.items()}
