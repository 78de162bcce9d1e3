"""What computes calls that keep every block: the host's attention, cuDNN in 16 bits, or PARO's kernel in 8."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from functools import lru_cache

import torch

from ...kernels.attention.cudnn import cudnn_attention, cudnn_serves
from ...kernels.core.dispatch import capability_of_gpu
from ...kernels.core.layout import TokenLayout
from ...kernels.core.pattern import SparsePattern
from ..plan.orders import ORIGINAL
from .patterns import build_pattern

log = logging.getLogger("paro")

# Tokens from which cuDNN is faster than FlashAttention, which the host's own function has torch take, by GPU generation
# and head dimension. Measured on an H200 with bf16, ms of FlashAttention and of cuDNN: 1,024 tokens x 24 heads of 128
# 0.070, 0.074; 2,048 x 24 0.170, 0.097; 4,608 x 24 0.79, 0.40; 16,896 x 24 10.1, 5.65; 32,760 x 40 61.1, 38.2; 75,600 x
# 40 331, 209; heads of 64: 4,992 x 32 0.70, 0.44; 8,192 x 24 1.36, 0.86. Other GPUs are not measured.
CUDNN_FASTER_FROM = {(9, 128): 2_048, (9, 64): 4_096}
# Tokens from which PARO's dense kernel is faster than cuDNN, by GPU generation and precision. Measured on an H200 with
# bf16, ms of cuDNN and of PARO in FP8: 75,600 tokens x 40 heads 207, 157; 32,760 x 40 38.5, 29.5; 32,760 x 12 with two
# conditionings 21.7, 17.9; 16,896 x 24 5.05, 5.28. In INT8 208, 172 at 75,600 x 40 (H100). Other GPUs are not measured.
PARO_FASTER_FROM = {(9, "fp8"): 24_000, (9, "int8"): 60_000}
# Relative L2 difference of two results in 16 bits; about 3e-3 in bf16.
ROUNDING = 1e-2

_proven: dict[tuple, bool] = {}
_lock = threading.Lock()


def paro_is_faster(q: torch.Tensor, precision: str) -> bool:
    """Whether PARO's kernel was measured to be faster than any in 16 bits on calls like q `[B, H, L, D]` that keep
    every block."""
    capability = capability_of_gpu(q.device)
    least = None if capability is None else PARO_FASTER_FROM.get((capability[0], precision))
    return least is not None and q.shape[3] == 128 and q.shape[2] >= least


def paro_pays_when_short(device: torch.device) -> bool:
    """Whether PARO's kernel is worth using on sequences too short to drop blocks from.

    Not on Hopper: one step of Flux 1 at 1024 took 197 ms with it and 183 with cuDNN (H100, `docs/benchmarks.md`). Other
    GPUs are not measured; there 8-bit products have a larger lead over the host's 16-bit attention.
    """
    capability = capability_of_gpu(device)
    return capability is None or capability[0] != 9


def in_16_bits(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, host: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """`host()`, or the same to within rounding by cuDNN where that was measured to be faster.

    q `[B, H, Lq, D]`, k and v `[B, H, L, D]`; host: runs torch's attention on them as the host does. The first call of
    a shape (and strides, which cuDNN has other kernels for) in a process runs both: where cuDNN fails or differs, the
    host's attention does that shape from then on.
    """
    capability = capability_of_gpu(q.device)
    least = None if capability is None else CUDNN_FASTER_FROM.get((capability[0], q.shape[3]))
    if least is None or k.shape[2] < least or not cudnn_serves(q, k, v):
        return host()
    key = (q.device, q.dtype, q.shape, k.shape, q.stride(), k.stride(), v.stride())
    with _lock:
        proven = _proven.get(key)
    if proven is False:
        return host()
    try:
        out = cudnn_attention(q, k, v, scale=scale)
    except torch.OutOfMemoryError:
        return host()
    except (RuntimeError, TypeError) as error:
        _settle(key, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        return host()
    return out if proven else _compared(out, host, key)


def _compared(out: torch.Tensor, host: Callable[[], torch.Tensor], key: tuple) -> torch.Tensor:
    """out if the host's attention gives the same, else what that gives; where there is no memory to tell, another call
    will be compared."""
    try:
        expected = host()
    except torch.OutOfMemoryError:
        del out
        return host()
    try:
        # A head at a time: beside a large model there is no room for another result in float32.
        heads = range(out.shape[1])
        wrong = torch.stack([(out[:, head] - expected[:, head]).float().norm() for head in heads]).norm()
        whole = torch.stack([expected[:, head].float().norm() for head in heads]).norm()
        difference = (wrong / whole).item()
    except torch.OutOfMemoryError:
        return expected
    if difference <= ROUNDING:
        _settle(key, None)
        return out
    # What is not finite in both is not cuDNN's fault, and says nothing of the next call.
    if math.isfinite(whole.item()):
        _settle(key, f"it differs from the host's attention by {difference:.2g}")
    return expected


def _settle(key: tuple, problem: str | None) -> None:
    with _lock:
        _proven[key] = problem is None
    if problem is not None:
        log.warning("PARO: cuDNN is not used for dense attention of %s tokens (%s)", f"{key[2][2]:,}", problem)


@lru_cache(maxsize=8)
def dense_pattern(layout: TokenLayout, heads: int, kv_heads: int, device: torch.device) -> SparsePattern:
    """Every block, the model's own order. Kept: making it copies a table to the device and waits for that."""
    return build_pattern(layout, (ORIGINAL,) * heads, None, None, kv_heads=kv_heads, device=device)
