"""The model families PARO knows. A new family is one module and one entry here."""

from __future__ import annotations

from typing import Any

from . import flux, wan
from .base import Family, ModelCall, class_path

FAMILIES: tuple[Family, ...] = (wan.FAMILY, flux.FAMILY)

__all__ = ["FAMILIES", "Family", "ModelCall", "family_of"]


def family_of(model: Any) -> Family | str:
    """The family of a diffusion model, or a one-line reason why PARO leaves the model alone."""
    for family in FAMILIES:
        if family.recognise(model):
            return family.refusal(model) or family
    return f"the model class {class_path(model).rpartition('.')[2]} is not supported"
