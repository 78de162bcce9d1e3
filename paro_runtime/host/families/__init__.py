"""The model families PARO knows: every module of this folder that has a `FAMILY`."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from .base import CountedFamily, Family, ModelCall, Place, class_path


def _discover() -> tuple[Family, ...]:
    """The `FAMILY` of every module here, by module name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = (import_module(f".{name}", __name__) for name in names)
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


FAMILIES: tuple[Family, ...] = _discover()

__all__ = ["FAMILIES", "CountedFamily", "Family", "ModelCall", "Place", "family_of"]


def family_of(model: Any) -> Family | str:
    """The family of a diffusion model, or a one-line reason why PARO leaves the model alone."""
    for family in FAMILIES:
        if family.recognise(model):
            return family.refusal(model) or family
    return f"the model class {class_path(model).rpartition('.')[2]} is not supported"
