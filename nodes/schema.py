"""What all nodes of the pack share: category, socket types, and fields that older hosts do not know yet."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

CATEGORY = "model/patch/PARO"
# What density widgets show; it counts with the preset custom only.
DENSITY = 0.3
SettingsType = io.Custom("PARO_SETTINGS")
PlanType = io.Custom("PARO_PLAN")
# What people look for when they want the main node; the others answer to the pack's name and to what they do.
ALIASES = ["PARO", "PAROAttention"]
SPEED = ["sparse attention", "block sparse", "attention", "int8 attention", "sage", "speed", "speed up", "faster"]
SPEED += ["accelerate", "稀疏注意力", "稀疏", "注意力", "加速"]


def schema(**values: Any) -> io.Schema:
    """An `io.Schema` without the fields that this host does not have (search aliases before 0.11)."""
    if io.Hidden.unique_id in values.get("hidden", ()):
        # A node that knows its own number shows text under it. The host keeps results without asking for the number, so
        # a node of another workflow would be served that result, and its text would go to the first one's number.
        values["not_idempotent"] = True
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(**{name: value for name, value in values.items() if name in known})


def density_input(tooltip: str, **more: Any) -> io.Float.Input:
    """The share of blocks that is kept. It always has its place among the widgets, since saved workflows give values by
    place, by name and by link; that it does not count with every choice stands in its label."""
    bounds = {"default": DENSITY, "min": 0.01, "max": 1.0, "step": 0.01}
    return io.Float.Input("density", display_name="density if custom", tooltip=tooltip, **bounds, **more)


def advanced(kind: type, name: str, **values: Any) -> Any:
    """An optional input of class `kind` that the page folds away, on hosts whose inputs know `advanced`."""
    if "advanced" in inspect.signature(kind).parameters:
        values["advanced"] = True
    return kind(name, optional=True, **values)
