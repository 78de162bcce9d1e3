"""Which precision and which backend serve a call, and why none does."""

from __future__ import annotations

import torch

from ...kernels.core.precision import Precision
from ...kernels.core.support import triton_reason


def resolve_precision(name: str, recipe_precision: str, device: torch.device) -> str:
    """The precision to use: the user's, else the recipe's, else what suits the device.

    Hopper and data-centre Blackwell multiply FP8 as fast as INT8, and FP8 follows peaked attention better. GeForce Ada
    and Blackwell halve FP8 with 32-bit sums, and Ampere has none: INT8 there. Elsewhere the reference runs, and 16-bit
    values cost it nothing.
    """
    name = recipe_precision if name == "auto" else name
    if name != "auto":
        return name
    if device.type != "cuda" or torch.version.hip is not None:
        return "int8"
    return "fp8" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "int8_pv8"


def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision
) -> tuple[str, str | None]:
    """The backend to use and, if there is none, why.

    `auto`: Triton on a GPU that can, the reference on the CPU. On a GPU that cannot (no Triton, too old, another maker)
    the reference would be many times slower than the host's attention, so nothing is run there unless it is asked for.
    """
    if name == "reference" or (name == "auto" and device.type == "cpu"):
        return "reference", None
    return "triton", triton_reason(device, dtype, head_dim, precision)
