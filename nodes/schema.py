"""What all nodes of the pack share: category, socket types, and fields that older hosts do not know yet."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

CATEGORY = "model/patch/PARO"
SettingsType = io.Custom("PARO_SETTINGS")
PlanType = io.Custom("PARO_PLAN")
ALIASES = ["PARO", "PAROAttention", "sparse attention", "block sparse", "int8 attention", "sage", "speed up", "faster"]


def schema(**values: Any) -> io.Schema:
    """An `io.Schema` without the fields that this host does not have (search aliases before 0.11)."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(**{name: value for name, value in values.items() if name in known})


def advanced(kind: type, name: str, **values: Any) -> Any:
    """An optional input of class `kind` that the page folds away, on hosts whose inputs know `advanced`."""
    if "advanced" in inspect.signature(kind).parameters:
        values["advanced"] = True
    return kind(name, optional=True, **values)
