"""The attentions that whole runs are compared with: the host's own backends and its sparse node. Imports comfy.

Each takes a model patcher and a timeline (None: nothing is timed inside the run) and returns a clone, or raises
Unavailable with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from .timeline import Timeline

SLOT = "optimized_attention_override"
INT8 = "comfy_kitchen_int8"
KEPT = 0.3
"""Share of key blocks that `sol_attn` keeps by top-k: about what PARO's preset `balanced` keeps."""
# The rules of the host's node, where the host does not have it yet: its own defaults.
START_PERCENT, END_PERCENT, LEAST_TOKENS, HEAD_DIM, DEFAULT_TAU, EXTRA_TOKENS = 0.2, 1.0, 12_288, 128, 1.3, 256
NODE = "comfy_extras.nodes_sparse_attention"


class Unavailable(RuntimeError):  # noqa: N818 - a state, not a fault
    """This attention cannot run here; the message says why."""


def dense(model: Any, timeline: Timeline | None) -> Any:
    """The host's default."""
    return watch(model.clone(), timeline)


def backend(model: Any, timeline: Timeline | None, name: str) -> Any:
    """A backend of the host by the name under which it is registered."""
    from comfy.ldm.modules.attention import get_attention_function

    function = get_attention_function(name, None)
    if function is None:
        raise Unavailable(f"the host has no attention {name} here")
    timed = function if timeline is None else timeline.timed("dense_attention", function)

    def override(func: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        return timed(*args, **kwargs)

    container_function = getattr(function, "container_function", None)
    if container_function is not None:
        override.container_function = (
            container_function if timeline is None else timeline.timed("dense_attention", container_function)
        )
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[SLOT] = override
    return clone


def sol_attn(model: Any, timeline: Timeline | None, by_tau: bool = False) -> Any:
    """The host's sparse node over its INT8 backend: `KEPT` of the blocks, or by_tau, its own default method.

    A host that has the node runs it; for an older one the same kernel runs under the node's rules and defaults.
    """
    import comfy_kitchen

    if not hasattr(comfy_kitchen, "sol_attn"):
        raise Unavailable("this comfy_kitchen has no sol_attn")
    if model.load_device.type != "cuda":
        raise Unavailable("sol_attn runs on CUDA only")
    try:
        clone = backend(model, timeline, INT8)
    except Unavailable:
        clone = model.clone()
    try:
        node = importlib.import_module(NODE).BlockSparseAttention
    except ImportError:
        options = clone.model_options.setdefault("transformer_options", {})
        options[SLOT] = _sparse_override(clone, options.get(SLOT), by_tau)
    else:
        method = {"selection": "sol-attn", "tau": DEFAULT_TAU} if by_tau else {"selection": "sla"}
        method |= {} if by_tau else {"keep_percent": 100 * KEPT}
        extra = {"extra_tokens": EXTRA_TOKENS if by_tau else 0}
        clone = node.execute(clone, method, START_PERCENT, END_PERCENT, min_tokens=LEAST_TOKENS, **extra).args[0]
    return watch(clone, timeline)


def _sparse_override(model: Any, previous: Callable | None, by_tau: bool) -> Callable:
    """`sol_attn` for the calls that the node would give it, and `previous` or the host's own attention for others."""
    import comfy_kitchen

    sampling = model.get_model_object("model_sampling")
    start, end = (float(sampling.percent_to_sigma(p)) for p in (START_PERCENT, END_PERCENT))
    chosen = {"tau": DEFAULT_TAU, "token_aug": EXTRA_TOKENS} if by_tau else {"topk_ratio": KEPT}

    def override(func: Callable, q: Any, k: Any, v: Any, heads: int, mask: Any = None, *args: Any, **kwargs: Any):
        split = kwargs.get("skip_reshape", False)
        sigmas = (kwargs.get("transformer_options") or {}).get("sigmas")
        inside = sigmas is None or end <= float(sigmas[0]) <= start
        width = q.shape[-1] if split else q.shape[-1] // heads
        tokens = q.shape[2 if split else 1]
        alike = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
        if mask is not None or not inside or tokens < LEAST_TOKENS or not alike or width != HEAD_DIM:
            rest = (q, k, v, heads, mask, *args)
            return func(*rest, **kwargs) if previous is None else previous(func, *rest, **kwargs)
        rows = [t.transpose(1, 2) if split else t.unflatten(-1, (heads, width)) for t in (q, k, v)]
        out = comfy_kitchen.sol_attn(*rows, scale=kwargs.get("scale"), **chosen)
        return out.transpose(1, 2) if kwargs.get("skip_output_reshape") else out.flatten(2)

    return override


def watch(model: Any, timeline: Timeline | None) -> Any:
    """Time what runs on the host's own attention, whatever override stands before it. Changes and returns `model`."""
    if timeline is None:
        return model
    options = model.model_options.setdefault("transformer_options", {})
    inner = options.get(SLOT)

    def override(func: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        host = timeline.timed("dense_attention", func)
        return host(*args, **kwargs) if inner is None else inner(host, *args, **kwargs)

    if hasattr(inner, "container_function"):
        override.container_function = inner.container_function
    options[SLOT] = override
    return model
