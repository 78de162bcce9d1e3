"""The life of one run inside ComfyUI: OUTER_SAMPLE begins and ends it, APPLY_MODEL is one evaluation of the model.

Two wrappers on a clone of the model. All state of a run hangs on the run's own copy of the model options, which the
host makes for every sampling and drops at its end; here it is dropped as well, exceptions and cancelling included.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

from ..session import Report, Session
from ..tokens import TokenLayout
from .evaluation import OPTIONS_KEY, HostEvaluation
from .families import Family, ModelCall
from .override import SLOT, is_override, make_override

log = logging.getLogger("paro")

APPLY_MODEL_OPTIONS = 5
"""Position of `transformer_options` among APPLY_MODEL's arguments: x, t, c_concat, c_crossattn, control, options."""

ATTEMPTS = 4
"""Times one evaluation is run at most when its results are not finite."""


class HostRun:
    """One sampling: its session and family, carried by `transformer_options` between evaluations."""

    def __init__(self, session: Session, family: Family) -> None:
        self.session = session
        self.family = family
        self._sigmas: Any = None

    def begin(self, model: Any, args: tuple, extra: dict[str, Any], again: bool = False) -> HostEvaluation | None:
        """Begin an evaluation with APPLY_MODEL's arguments; None, with the reason counted, where PARO has no part.

        again: it is the one before, once more.
        """
        x, sigma, context, options = args[0], args[1], args[3], args[APPLY_MODEL_OPTIONS]
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
        common = {"sigma": sigma, "conditionings": _conditionings(options), "again": again}
        evaluations = (self.session.begin(layout=layout, **common) for layout in layouts)
        return HostEvaluation(self.session, self.family, *evaluations, counts=counts, uncountable=uncountable)

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

    start     makes the session of a run from its sigmas (the final one included).
    strict    trouble at the end of a run is an error, not a line in the log.
    """

    def __init__(self, family: Family, start: Callable[[list[float]], Session], strict: bool = False) -> None:
        self.family = family
        self.strict = strict
        self.last_report: Report | None = None
        self._start = start

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of OUTER_SAMPLE: (noise, latent_image, sampler, sigmas, ...), owner the guider."""
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        session = self._start([float(sigma) for sigma in sigmas])
        options[OPTIONS_KEY] = HostRun(session, self.family)
        _stand_first(options)
        self.last_report = None
        try:
            result = executor(*args, **kwargs)
        finally:
            options.pop(OPTIONS_KEY, None)
        self.last_report = self._finish(session)
        return result

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Wrapper of APPLY_MODEL: (x, t, c_concat, c_crossattn, control, transformer_options), owner the model."""
        run = args[APPLY_MODEL_OPTIONS].get(OPTIONS_KEY)
        if not isinstance(run, HostRun):
            return executor(*args, **kwargs)
        # Results that are not finite are found at the end, for all calls at once: the sites at fault are dense the next
        # time, and the last time PARO stays out of it.
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            evaluation = (
                None if last else self._begin(run, executor.class_obj.diffusion_model, args, kwargs, attempt > 0)
            )
            # Always a new dict: the host hands the same one to every evaluation of a step.
            options = {**args[APPLY_MODEL_OPTIONS], OPTIONS_KEY: evaluation}
            result = executor(*args[:APPLY_MODEL_OPTIONS], options, *args[APPLY_MODEL_OPTIONS + 1 :], **kwargs)
            if evaluation is None or not evaluation.end(attempt):
                break
        return result

    def _begin(
        self, run: HostRun, model: Any, args: tuple, extra: dict[str, Any], again: bool
    ) -> HostEvaluation | None:
        try:
            return run.begin(model, args, extra, again)
        except Exception as error:
            # A model that another node changed beyond recognition runs dense; it does not fail.
            if self.strict:
                raise
            run.session.decline(f"the token layout could not be read ({type(error).__name__}: {error})")
            return None

    def _finish(self, session: Session) -> Report | None:
        try:
            return session.finish()
        except Exception as error:
            # The pictures are made; nothing that goes wrong afterwards may cost them.
            if self.strict:
                raise
            log.warning("PARO: the run's report could not be made (%s: %s)", type(error).__name__, error)
            return None


def _conditionings(options: dict[str, Any]) -> tuple[tuple, ...]:
    """What tells an evaluation from the others of its step, and is the same in every step: the conditionings in it,
    positive or negative, their ids, and the frames of a context window, which some schedules move from step to step."""
    window = getattr(options.get("context_window"), "index_list", None)
    return tuple(tuple(found or ()) for found in (options.get("cond_or_uncond"), options.get("uuids"), window))


def _stand_first(options: dict[str, Any]) -> None:
    """Another node may have put its attention into the one slot there is after PARO did: stand before it for this run,
    so that the order of the nodes does not matter."""
    current = options.get(SLOT)
    if not is_override(current):
        options[SLOT] = make_override(current)
