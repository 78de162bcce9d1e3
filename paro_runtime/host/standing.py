"""PARO's attention stands before every other one in the host's one slot, whichever node was there first."""

from __future__ import annotations

from typing import Any

from .claims import OPTIONS_KEY, HostEvaluation
from .override import SLOT, is_override, make_override

KEY = "paro"
"""Under this key the host keeps PARO's wrappers and attachment, so that a second node replaces the first."""


def stand_first(options: dict[str, Any]) -> None:
    """Another node may have put its attention into the one slot there is after PARO did, or does so while sampling:
    stand before it, so that the order does not matter."""
    current = options.get(SLOT)
    if not is_override(current):
        options[SLOT] = make_override(current)


def stand_around(evaluation: HostEvaluation, options: dict[str, Any]) -> None:
    """Stand before an attention that was put into the slot since. Wrappers behind PARO's may do so too: where there are
    any, a last one, next to the model, stands first again. Else there is none, since it would be compiled with the
    model."""
    stand_first(options)
    if not others_around(options):
        return
    wrappers = options["wrappers"]
    inner = {name: given for name, given in wrappers.get("diffusion_model", {}).items() if name != KEY}
    options["wrappers"] = {**wrappers, "diffusion_model": {**inner, KEY: [_next_to_the_model]}}
    evaluation.reached = False


def others_around(options: dict[str, Any]) -> bool:
    """Whether wrappers of other nodes stand around the model; the host's own for compiled models is none."""
    wrappers = options.get("wrappers", {})
    keys = set().union(*(wrappers.get(kind, {}) for kind in ("apply_model", "diffusion_model")))
    return not keys <= {KEY, "torch.compile"}


def _next_to_the_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrapper of DIFFUSION_MODEL, whose arguments are each model's own."""
    for given in (*args, *kwargs.values()):
        evaluation = given.get(OPTIONS_KEY) if isinstance(given, dict) else None
        if isinstance(evaluation, HostEvaluation):
            evaluation.reached = True
            try:
                stand_first(given)
            except Exception as error:
                evaluation.trouble("standing before another attention", error)
    return executor(*args, **kwargs)
