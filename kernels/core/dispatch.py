"""The one place that says what serves a call: which backend, which kernel of it, and why the others do not.

Kernels declare what they serve beside their code (`support.Kernel`): Triton's in `support.triton_reason`, the attention
kernel for sm_90 in `attention/gluon_sm90/launch.py`. The reference serves everything. Calls that keep every block in 16
bits are not the kernels': `paro_runtime/attention/dense.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch

from .precision import PRECISIONS, Precision
from .support import TRITON, Kernel, Request, target_of

BACKENDS = ("auto", "triton", "reference")
# Of what is no attention call: measured in the inputs' own type.
UNQUANTIZED = PRECISIONS["16bit"]


class Served(NamedTuple):
    """by: the kernel, or `reference`. why_not: of each kernel that was asked for before, why it does not serve."""

    by: str
    why_not: dict[str, str]

    @property
    def reason(self) -> str | None:
        """Why Triton was asked for and does not serve, or None."""
        return self.why_not.get(TRITON.name)


def served(request: Request, kernels: Iterable[Kernel] = (TRITON,)) -> Served:
    """The first of the kernels that can serve the call and should."""
    why_not: dict[str, str] = {}
    for kernel in kernels:
        reason = kernel.why_not(request) or kernel.why_unwanted(request)
        if reason is None:
            return Served(kernel.name, why_not)
        why_not[kernel.name] = reason
    return Served("reference", why_not)


def resolve(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision) -> Served:
    """By `triton` or `reference`, as asked for; `auto` is Triton wherever it serves, and the reference on the CPU.

    On a GPU that Triton does not serve (not installed, too old, another maker) the reference would be many times slower
    than the host's attention: whoever has that asks for the `reason`. Raises ValueError for another name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference" or (backend == "auto" and device.type == "cpu"):
        return Served("reference", {})
    ask = _on_gpu if device.type == "cuda" else _on
    return ask(device, dtype, head_dim, precision)


def _on(device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision) -> Served:
    return served(Request(target_of(device), dtype, head_dim, precision))


# A GPU does not change: asked once, not in every call.
_on_gpu = lru_cache(maxsize=64)(_on)


def chosen_backend(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision) -> str:
    """`resolve` for an operator: `triton` or `reference`. Triton asked for by name where it does not serve is a
    ValueError."""
    found = resolve(backend, device, dtype, head_dim, precision)
    if found.why_not and backend == "triton":
        raise ValueError(f"triton: {found.reason}")
    return found.by


def resolve_precision(name: str, recipe_precision: str, device: torch.device) -> str:
    """The precision to use, a name of `PRECISIONS`: the user's, else the recipe's, else what suits the device.

    Hopper and data-centre Blackwell multiply FP8 as fast as INT8, and FP8 follows peaked attention better. GeForce Ada
    and Blackwell halve FP8 with 32-bit sums, and Ampere has none: INT8 there. Elsewhere the reference runs, and 16-bit
    values cost it nothing.
    """
    name = recipe_precision if name == "auto" else name
    if name != "auto":
        return name
    capability = capability_of_gpu(device)
    if capability is None:
        return "int8"
    return "fp8" if capability[0] in (9, 10) else "int8_pv8"


def capability_of_gpu(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for every other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def uses_reference(backend: str, x: torch.Tensor) -> bool:
    """Whether the reference serves an operator of statistics over rows x `[B, H, n, D]`; raises as `chosen_backend`."""
    return chosen_backend(backend, x.device, x.dtype, x.shape[3], UNQUANTIZED) == "reference"
