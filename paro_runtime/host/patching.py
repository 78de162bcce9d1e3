"""Putting PARO on a model and taking it off: a clone carries everything, the model itself is never touched."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from ..calibration.calibrator import Calibrator
from ..config.recipes import RecipeError, mask_options, recipe_for
from ..config.settings import Settings, SettingsError
from ..plan.plan import Plan, PlanError
from ..plan.store import PlanStore
from ..report.reasons import NOT_ON_IT, not_used
from ..report.report import Report
from ..run.policy import Policy
from ..run.session import Session
from ..run.ulysses import several_ranks
from .families import Family, family_of
from .identity import identify
from .noise import time_gone
from .override import SLOT, make_override, without_paro
from .wrappers import KEY, Lifecycle

log = logging.getLogger("paro")


def patch_model(
    model: Any,
    settings: Settings,
    *,
    plan: Plan | None = None,
    store: PlanStore | None = None,
    remember: bool = False,
    on_status: Callable[[str], None] | None = None,
    note: str | None = None,
) -> Any:
    """A clone of a host model that runs under PARO; for a model PARO does not know, a clone without PARO.

    store, remember: where plans are, and whether those made on the way are kept there; see `Policy`. on_status gets one
    line of text whenever there is something to show; note opens the notes of every run's report. Raises PlanError for
    a plan of another model.

    In one of several processes that share the work the store is left alone: its plans are of all heads, and what such
    a run makes may be of some.
    """
    if several_ranks():
        store, remember = None, False
    clone = remove(model)
    try:
        found = _lifecycle(model, clone, settings, (plan, store, remember), on_status, note)
        if isinstance(found, Lifecycle):
            install(clone, found)
            return clone
    except (PlanError, SettingsError, RecipeError):  # what the user gave
        raise
    except Exception as error:
        if settings.strict:
            raise
        reason = found = f"the model could not be read ({type(error).__name__}: {error})"
        log.error("PARO: %s", reason, exc_info=error)
        clone = remove(model)  # nothing stays of half an installation
    _say(on_status, not_used(found))
    clone.set_attachments(KEY, found)
    return clone


def _lifecycle(
    model: Any,
    clone: Any,
    settings: Settings,
    plans: tuple[Plan | None, PlanStore | None, bool],
    on_status: Callable[[str], None] | None,
    note: str | None,
) -> Lifecycle | str:
    """What goes onto the clone of a model, or why PARO leaves it alone. plans: plan, store and remember of
    `patch_model`."""
    family = family_of(clone.model.diffusion_model)
    if isinstance(family, str):
        return family
    plan, store, remember = plans
    policy = replace(policy_for(clone, family, settings, plan, store), remember=remember)

    def start(sigmas: list[float], sampled: Any) -> Session:
        # A node behind this one may have given the model another schedule.
        sampling = (clone if sampled is None else sampled).get_model_object("model_sampling")
        session = Session(
            policy, sigmas=sigmas, on_status=on_status, lasting=not_recorded(),
            highest_noise=float(sampling.sigma_max), time_gone=time_gone(sampling),
        )  # fmt: skip
        session.log.notes.extend(notes)
        return session

    notes = [note] if note else []
    if isinstance(model.get_attachment(KEY), Lifecycle):
        notes.append(
            "the model had been through a PARO Patch Model before: this one replaces it, with its own settings; "
            "take one of them away"
        )
        _say(on_status, notes[-1])
    return Lifecycle(family, start, settings.strict, on_status)


def calibration_model(
    model: Any,
    family: Family,
    policy: Policy,
    calibrator: Calibrator,
    steps: Callable[[int], frozenset[int] | None],
    on_status: Callable[[str], None] | None = None,
) -> Any:
    """A clone that runs dense and shows what passes by to the calibrator.

    steps: the steps to watch, given how many there are; None for all.
    """
    clone = remove(model)

    def start(sigmas: list[float], sampled: Any) -> Session:
        watched = steps(len(sigmas) - 1)
        return Session(
            policy, sigmas=sigmas, on_status=on_status, lasting=not_recorded(),
            calibrator=calibrator, calibrate_steps=watched,
        )  # fmt: skip

    install(clone, Lifecycle(family, start, strict=True, on_status=on_status))
    return clone


def not_recorded() -> Callable[[], AbstractContextManager]:
    """Makes contexts in which the host does not record what is allocated.

    Hosts from about 0.36 record the allocations of a forward and expect each to end within its block. Older ones record
    nothing. These contexts do not nest: leaving the inner one ends the outer one too.
    """
    try:
        from comfy.model_prefetch import pause_malloc_graph
    except ImportError:
        return nullcontext
    return pause_malloc_graph


def policy_for(
    model: Any, family: Family, settings: Settings, plan: Plan | None = None, store: PlanStore | None = None
) -> Policy:
    """Everything that is decided before a run. Raises PlanError, SettingsError or RecipeError with one line."""
    identity = identify(model, family.name)
    if plan is not None:
        # The grid may differ, it is known only when a run begins; the model may not.
        foreign = plan.foreign(identity)
        if foreign is not None:
            raise PlanError(f"{foreign}; choose a plan of this model, or set plan_file to auto")
    recipe = recipe_for(family.name if settings.recipe == "auto" else settings.recipe)
    mask_options(settings.validated(), recipe)
    return Policy(identity, recipe, settings, plan, store)


def install(clone: Any, lifecycle: Lifecycle) -> None:
    """Put the override, the two wrappers and the lifecycle on a model that has none of them."""
    from comfy.patcher_extension import WrappersMP

    options = clone.model_options["transformer_options"]
    options[SLOT] = make_override(options.get(SLOT))
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, lifecycle.outer_sample)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, lifecycle.apply_model)
    clone.set_attachments(KEY, lifecycle)


def remove(model: Any) -> Any:
    """A clone of a host model without PARO; an override that PARO chained is back in its place."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    previous = without_paro(options.get(SLOT))
    if previous is None:
        options.pop(SLOT, None)
    else:
        options[SLOT] = previous
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL):
        clone.remove_wrappers_with_key(kind, KEY)
    clone.remove_attachments(KEY)
    return clone


def last_report(model: Any, samples: Any = None) -> Report | str:
    """The report of the run of a patched model that made the latent `samples`, of its last complete run where that is
    not known, or a one-line reason why there is none."""
    found = model.get_attachment(KEY)
    if isinstance(found, Lifecycle):
        return found.report_of(samples) or found.why_no_report
    return not_used(found or NOT_ON_IT)


def is_of_another_run(model: Any, samples: Any) -> bool:
    """Whether `last_report` cannot tell which run made the latent, so that it may be another one's."""
    found = model.get_attachment(KEY)
    return isinstance(found, Lifecycle) and not found.knows(samples)


def _say(on_status: Callable[[str], None] | None, text: str) -> None:
    log.info("PARO: %s", text)
    if on_status is not None:
        on_status(text)
