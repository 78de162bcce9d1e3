"""Which hardware the Triton kernels can serve, and what they can do natively there. Imports Triton only to ask."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

from .precision import Precision

HEAD_DIMS = (32, 256)
# Below sm_80 there is no 16-bit tensor product with fp32 accumulation that Triton compiles well.
LOWEST_CAPABILITY = (8, 0)
LOWEST_FP8_CAPABILITY = (8, 9)
# Rotation holds a D x D matrix of 16 bits in shared memory: beyond this D only data-centre GPUs have room.
WIDEST_ROTATION = 128
ROOMY_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))


_compile_for: tuple[int, int] | None = None


def compile_for(capability: tuple[int, int]) -> None:
    """This process only compiles, for a GPU of this compute capability; CPU tensors stand for that GPU's."""
    global _compile_for
    _compile_for = capability


def compiled_for() -> tuple[int, int] | None:
    """The compute capability that this process only compiles for; None in every process that computes."""
    return _compile_for


def interpreted() -> bool:
    """Whether Triton runs its kernels in the CPU interpreter (a testing aid, chosen before the first import)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def triton_reason(device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision) -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {dtype} is not supported, only fp16, bf16 and fp32"
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return f"head dimension {head_dim} is outside {HEAD_DIMS[0]} to {HEAD_DIMS[1]}"
    if device.type != "cuda" and _compile_for is None:
        if device.type != "cpu" or not interpreted():
            return f"triton does not run on {device.type}"
        if dtype == torch.bfloat16:
            return "triton's interpreter cannot multiply bf16"
        return None
    if torch.version.hip is not None and _compile_for is None:
        # Compiles, but nobody has run it: the caller's self-check decides.
        return "fp8 is not supported on AMD" if precision.pv == "fp8" else None
    capability = _compile_for or torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        return f"compute capability {_version(capability)} is below {_version(LOWEST_CAPABILITY)}"
    if precision.pv == "fp8" and capability < LOWEST_FP8_CAPABILITY:
        return f"fp8 needs compute capability {_version(LOWEST_FP8_CAPABILITY)}, this GPU has {_version(capability)}"
    if precision.hadamard and head_dim > WIDEST_ROTATION and capability not in ROOMY_CAPABILITIES:
        return f"rotation at head dimension {head_dim} does not fit into this GPU's shared memory"
    return None


def int4_is_native(capability: tuple[int, int]) -> bool:
    """Whether INT4 products run faster than INT8 ones with these kernels on this GPU: nowhere yet.

    sm_80/86/89 have 4-bit integer tensor cores and Blackwell has block-scaled FP4, but Triton reaches neither in a
    form these kernels use; elsewhere 4-bit integer instructions are emulated. INT4 means 4-bit values at 8-bit speed:
    keys are stored two a byte, which halves their memory and takes some 5 % more instructions in the loop.
    """
    return False


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


@lru_cache(maxsize=8)
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The GPU's compute capability; None on AMD. The interpreter stands in for the oldest GPU."""
    if device.type != "cuda":
        return compiled_for() or LOWEST_CAPABILITY
    return None if torch.version.hip else torch.cuda.get_device_capability(device)
