"""What calls run on, how a kernel declares which calls it serves, and which ones the Triton kernels do.

Imports Triton only to ask whether it is there. `dispatch` chooses by what kernels declare.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

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


@lru_cache(maxsize=8)
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The GPU's compute capability; None on AMD. The interpreter stands in for the oldest GPU."""
    if device.type != "cuda":
        return compiled_for() or LOWEST_CAPABILITY
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


class Target(NamedTuple):
    """kind: `nvidia`, `amd`, `interpreter` (Triton's, on the CPU) or torch's name of a device that Triton has no part
    in. capability: compute capability of an NVIDIA GPU, else None."""

    kind: str
    capability: tuple[int, int] | None = None


def target_of(device: torch.device) -> Target:
    """What kernels on this device's tensors run on, or are compiled for."""
    if _compile_for is not None:
        return Target("nvidia", _compile_for)
    if device.type == "cuda":
        return Target("amd") if torch.version.hip is not None else nvidia(torch.cuda.get_device_capability(device))
    return Target("interpreter" if device.type == "cpu" and interpreted() else device.type)


def nvidia(capability: tuple[int, int]) -> Target:
    """A GPU of this compute capability."""
    return Target("nvidia", capability)


class Request(NamedTuple):
    """What decides which kernels serve a call. The last four matter to attention alone.

    form: `dense` (every block is kept), `list` (some are), `tail` (and pooled keys stand for the others). block_q:
    query rows of a block of the mask. pool: tokens per pooled key. biased: with a bias per key.
    """

    target: Target
    dtype: torch.dtype
    head_dim: int
    precision: Precision
    form: str = "dense"
    block_q: int = 64
    pool: int = 64
    biased: bool = False


def form_of(listed: bool, tail: bool) -> str:
    """`Request.form`: listed: there is a list of kept blocks; tail: and a pooled tail."""
    return ("tail" if tail else "list") if listed else "dense"


@dataclass(frozen=True)
class Kernel:
    """What a kernel declares, beside its code: why it cannot serve a call, or None; why_unwanted: why it should not
    although it can, or None (another was measured to be faster, it is still being compiled)."""

    name: str
    why_not: Callable[[Request], str | None]
    why_unwanted: Callable[[Request], str | None] = lambda request: None


def triton_reason(request: Request) -> str | None:
    """Why the Triton kernels cannot run here, or None. They have every form."""
    (kind, capability), dtype, head_dim, precision = request[:4]
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {dtype} is not supported, only fp16, bf16 and fp32"
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return f"head dimension {head_dim} is outside {HEAD_DIMS[0]} to {HEAD_DIMS[1]}"
    if kind == "interpreter":
        return "triton's interpreter cannot multiply bf16" if dtype == torch.bfloat16 else None
    if kind == "amd":
        # Compiles, but nobody has run it: the caller's self-check decides.
        return "fp8 is not supported on AMD" if precision.needs_fp8 else None
    if capability is None:
        return f"triton does not run on {kind}"
    if capability < LOWEST_CAPABILITY:
        return f"compute capability {_version(capability)} is below {_version(LOWEST_CAPABILITY)}"
    if precision.needs_fp8 and capability < LOWEST_FP8_CAPABILITY:
        return f"fp8 needs compute capability {_version(LOWEST_FP8_CAPABILITY)}, this GPU has {_version(capability)}"
    if precision.rotates and head_dim > WIDEST_ROTATION and capability not in ROOMY_CAPABILITIES:
        return f"rotation at head dimension {head_dim} does not fit into this GPU's shared memory"
    return None


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


TRITON = Kernel("triton", triton_reason)
