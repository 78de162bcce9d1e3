"""Attention functions that PARO is compared with, each behind the same call.

A maker takes q, k, v `[B, H, L, D]` of as many heads each and returns a function that runs once and returns
`[B, H, L, D]`. Makers raise what importing and asking raises; `Unavailable` says in one line what is missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[], torch.Tensor]
Make = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Run]


class Unavailable(RuntimeError):  # noqa: N818
    """An attention that this machine or this call has not got; the message is one line."""


def sdpa(backend: SDPBackend) -> Make:
    """torch's attention by one of its backends and no other."""

    def make(q, k, v):
        def run():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return run

    return make


def sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    """SageAttention, whichever of its kernels it chooses for this GPU."""
    sageattn = _module("sageattention").sageattn
    return lambda: sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def kitchen_int8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    """The INT8 attention of comfy_kitchen, which ComfyUI offers as an attention backend."""
    attention = _kitchen("int8_attention")
    return lambda: attention(q, k, v)


def kitchen_sol(density: float) -> Make:
    """The block-sparse attention of comfy_kitchen that keeps this share of the keys' blocks; heads of 128 only."""

    def make(q, k, v):
        attention = _kitchen("sol_attn")
        if q.shape[3] != 128:
            raise Unavailable(f"sol_attn is for heads of 128 channels, these have {q.shape[3]}")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return lambda: attention(q, k, v, topk_ratio=density).transpose(1, 2)

    return make


def _kitchen(name: str) -> Callable[..., torch.Tensor]:
    found = getattr(_module("comfy_kitchen"), name, None)
    if found is None:
        raise Unavailable(f"comfy_kitchen {version_of('comfy-kitchen') or 'of this machine'} has no {name}")
    return found


def _module(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise Unavailable(f"{name} is not installed") from None


def version_of(*packages: str) -> str | None:
    """Version of the first of these packages that is installed, or None."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
