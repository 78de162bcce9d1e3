"""Which backend serves a call: Triton where it runs, else the PyTorch reference."""

from __future__ import annotations

from functools import lru_cache

import torch

from .precision import Precision
from .support import triton_reason

BACKENDS = ("auto", "triton", "reference")
STATISTICS_PRECISION = Precision("16", "16")


# A GPU does not change: asked once, not in every call.
_reason_on_gpu = lru_cache(maxsize=64)(triton_reason)


def capability_of_gpu(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for every other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def chosen_backend(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision) -> str:
    """`triton` or `reference`. `auto` is Triton on a GPU that it serves; asking for it elsewhere is a ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference" or (backend == "auto" and device.type == "cpu"):
        return "reference"
    why_not = _reason_on_gpu if device.type == "cuda" else triton_reason
    reason = why_not(device, dtype, head_dim, precision)
    if reason and backend == "triton":
        raise ValueError(f"triton: {reason}")
    return "reference" if reason else "triton"
