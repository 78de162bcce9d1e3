"""Which hardware Triton can serve."""

from __future__ import annotations

import torch

from .problem import Precision


def triton_reason(device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision) -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    return "the Triton kernels are not built yet"
