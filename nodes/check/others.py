"""What other nodes put on a model that concerns attention or whole evaluations, and how it stands to PARO."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from ...paro_runtime.host.override import SLOT, without_paro
from ...paro_runtime.host.wrappers import KEY

SPARSE = ("sparse", "sol_attn", "radial", "sparge", "vsa")
CACHES = ("cache",)


def others_on(model: Any) -> Iterator[str]:
    """A line for everything found on a host's model patcher; PARO's own is left out."""
    options = model.model_options.get("transformer_options", {})
    override = without_paro(options.get(SLOT))
    if override is not None:
        yield _override(origin(override))
    for name, found in options.get("patches", {}).items():
        if "attn" in name:
            yield f"{_several(found)}: {name} in the attention blocks; it stays where it is, the order does not matter"
    for name, found in options.get("patches_replace", {}).items():
        if found:
            yield (
                f"{_several(found.values())}: replaces {name} blocks; models that do not name the running block run "
                "without PARO then"
            )
    yield from _wrappers(model, options)
    wrapper = model.model_options.get("model_function_wrapper")
    if wrapper is not None:
        yield f"{origin(wrapper)}: wraps every evaluation; the order does not matter"
    for name in getattr(model, "object_patches", {}):
        if name.startswith("diffusion_model"):
            yield f"a node has replaced {name} of the model: PARO sees the attention that is left in it"


def _override(where: str) -> str:
    if any(word in where.lower() for word in SPARSE):
        return (
            f"{where}: another sparse attention; PARO goes first and takes the calls it knows, so use one of them: "
            "compare with PARO Patch Model off"
        )
    return (
        f"{where}: attention of another node; PARO goes first and leaves it dense steps and every call that is not "
        "PARO's, in whatever order the nodes stand"
    )


def _wrappers(model: Any, options: dict[str, Any]) -> Iterator[str]:
    """One line for each node: the host keeps its wrappers by kind and then by the node's key."""
    seen: dict[Any, Any] = {}
    for kinds in (getattr(model, "wrappers", {}), options.get("wrappers", {})):
        for by_key in kinds.values():
            for key, functions in by_key.items():
                if key != KEY and functions:
                    seen.setdefault(key, functions[0])
    for key, function in seen.items():
        name = f"{key or 'a wrapper'} ({origin(function)})"
        if key == "torch.compile":
            yield f"{name}: compiles the model; PARO's calls stand outside of the graphs, the order does not matter"
        elif any(word in f"{key} {origin(function)}".lower() for word in CACHES):
            yield f"{name}: skips evaluations; it works with PARO, and both gains do not multiply; the order is free"
        else:
            yield f"{name}: wraps the model; the order does not matter"


def origin(function: Any) -> str:
    """The module of a function and its name, without what is the same for all: for people who look for a node."""
    function = inspect.unwrap(getattr(function, "func", function))
    if getattr(function, "__qualname__", "").startswith("ModelPatcher.set_model_optimized_attention"):
        chosen = inspect.getclosurevars(function).nonlocals.get("optimized_attention")
        return f"Model Attention Backend, {getattr(chosen, '__name__', 'unknown')}"
    kind = function if hasattr(function, "__qualname__") else type(function)
    module = (getattr(kind, "__module__", None) or "").replace("\\", "/").rpartition("custom_nodes/")[2]
    return f"{module.removeprefix('custom_nodes.')}: {kind.__qualname__.replace('.<locals>', '')}"


def _several(functions: Any) -> str:
    return ", ".join(dict.fromkeys(map(origin, functions)))
