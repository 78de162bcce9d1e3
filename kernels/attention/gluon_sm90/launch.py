"""Which calls the Gluon kernel can do, which it is given, and its launch. Importing it needs neither Triton nor Gluon.

Gluon is an experimental part of Triton and its names move. Whatever goes wrong before the kernel runs, the Triton
kernel does the call, and all that follow: one line in the log, no exception.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...core.layout import BLOCK_K
from ...core.precision import PRECISIONS, Precision
from ...core.support import Kernel, Request
from ..tiles import Tile

log = logging.getLogger("paro")

CAPABILITY = (9, 0)
# Where it has been compiled and read: names and register allocation differ between versions.
TRITON_VERSIONS = ("3.6.0", "3.7.1")
STAGES = 3
# 128 rows in two warpgroups; with the loading warp's and the idle default ones twelve warps and more.
TILE = Tile(128, True, 12, STAGES)
# Before setmaxnreg: 168 x 384 threads fill the register file. The consumers then get 240 each.
REGISTERS = 168


class Choice(NamedTuple):
    gluon: bool
    # Why: a measurement by which kernel, ms of Triton and of Gluon at 75,600 tokens x 8 heads on an H100.
    reason: str


FP8, INT8 = PRECISIONS["fp8"], PRECISIONS["int8"]
# What the kernel can do, and which kernel is faster at it. Keys: head dimension, precision, `Request.form`.
CHOICES = {
    (128, FP8, "dense"): Choice(False, "27.9, 28.9"),
    (128, FP8, "list"): Choice(True, "9.69, 8.69 at density 0.3; 3.28, 3.04 at 0.1"),
    (128, FP8, "tail"): Choice(True, "10.07, 9.40 at density 0.3; 7.05, 6.71 at 0.2; 4.09, 4.06 at 0.1"),
    (128, INT8, "dense"): Choice(True, "41.0, 31.2"),
    (128, INT8, "list"): Choice(True, "12.85, 10.09 at density 0.3"),
    (128, INT8, "tail"): Choice(True, "13.62, 10.76 at density 0.3; 5.55, 4.49 at 0.1"),
    (64, FP8, "dense"): Choice(False, "22.1, 22.8"),
    (64, FP8, "list"): Choice(False, "6.60, 7.11 at density 0.3"),
    (64, FP8, "tail"): Choice(False, "not measured; as without a tail"),
    (64, INT8, "dense"): Choice(True, "32.3, 23.1"),
    (64, INT8, "list"): Choice(True, "10.04, 7.75 at density 0.3"),
    (64, INT8, "tail"): Choice(True, "not measured; as without a tail"),
}
_forbidden: str | None = None
_all = False
_held = False
_of_thread = threading.local()


def forbid(reason: str | None) -> None:
    """Keep to the Triton kernel from now on, in this process; None takes it back."""
    global _forbidden
    _forbidden = reason


def prefer_always(always: bool) -> None:
    """Whether to do every call that Gluon can do, not only those `CHOICES` gives it: for tests and measurements."""
    global _all
    _all = always


def hold(held: bool) -> None:
    """Whether calls keep to the Triton kernel for now, because the Gluon one is still being compiled."""
    global _held
    _held = held


@contextmanager
def set_aside(aside: bool = True) -> Iterator[None]:
    """Calls of this thread keep to the Triton kernel inside; with False they go to Gluon although it is held."""
    before = getattr(_of_thread, "aside", None)
    _of_thread.aside = aside
    try:
        yield
    finally:
        _of_thread.aside = before


def why_unwanted(head_dim: int, precision: Precision, form: str) -> str | None:
    """Why a call is not to be planned for Gluon even where Gluon serves it, or None. It depends on the state of the
    process and of this thread."""
    if _forbidden is not None:
        return _forbidden
    aside = getattr(_of_thread, "aside", None)
    if _held if aside is None else aside:
        return "set aside"
    choice = CHOICES.get((head_dim, precision, form))
    if choice is None:
        return "no such form"
    return None if choice.gluon or _all else f"Triton's is faster (ms of Triton, of Gluon: {choice.reason})"


def why_not(request: Request) -> str | None:
    """Why the Gluon kernel cannot do this call, or None."""
    if request.target.capability != CAPABILITY:
        return "it is for sm_90"
    if (request.head_dim, request.precision, request.form) not in CHOICES:
        return f"no {request.form} form at head dimension {request.head_dim} in this precision"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {request.dtype} is not supported, only fp16 and bf16"
    if request.form != "dense" and request.block_q != TILE.rows:
        return f"query blocks of {request.block_q} rows, not {TILE.rows}"
    if request.biased:
        return "a bias per key"
    if request.form == "tail" and request.pool != BLOCK_K:
        return f"pools of {request.pool} keys, not {BLOCK_K}"
    return None if _importable() else "not verified with this Triton"


KERNEL = Kernel("gluon_sm90", why_not, lambda asked: why_unwanted(asked.head_dim, asked.precision, asked.form))


@cache
def _importable() -> bool:
    import triton

    version = triton.__version__.split("+")[0]
    if version not in TRITON_VERSIONS:
        log.info("attention: the kernel for sm_90 is not verified with Triton %s, the general one is used", version)
        return False
    return True


# Tensor descriptors, by the scratch tensor of K: making them takes longer than a launch. They hold the memory but not
# that tensor, so they go with it: kept scratch keeps its descriptors, that of one call is free after the call.
_sources = WeakTensorKeyDictionary()


def _sources_of(s: dict[str, torch.Tensor], dim: int, tail: bool) -> tuple:
    """Descriptors of K, V, pooled K and pooled V, block by block; the pools None without a tail."""
    found = _sources.get(s["k"])
    if found is None:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        types = {
            torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv, torch.float16: gl.float16,
            torch.bfloat16: gl.bfloat16,
        }  # fmt: skip

        def source(name, block):
            layout = gl.NVMMASharedLayout.get_default_for(block, types[s[name].dtype])
            return TensorDescriptor.from_tensor(s[name].view(-1, block[1]), block, layout)

        rows = [BLOCK_K, dim]
        values = source("v", rows if s["v"].dtype.itemsize == 2 else rows[::-1])
        pools = (source("pooled_k", rows), source("pooled_v", rows)) if tail else (None, None)
        found = _sources[s["k"]] = (source("k", rows), values, *pools)
    return found


def launch(piece, s: dict[str, torch.Tensor], pattern, scale_log2: float, nonfinite: torch.Tensor | None) -> bool:
    """`launch.forward` of attention for a piece planned for Gluon. False, and never again, if it cannot be launched."""
    try:
        _launch(piece, s, pattern, scale_log2, nonfinite)
        return True
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
        log.warning("attention: the kernel for sm_90 cannot be launched, the general one is used (%s)", reason)
        forbid(reason)
        return False


def _launch(piece, s, pattern, scale_log2, nonfinite) -> None:
    from .forward import gluon_forward

    call, q, out, g = piece.call, piece.q, piece.out, pattern.geometry
    heads, tail = q.shape[1], piece.tail_bias is not None
    keys, values, pooled_k, pooled_v = _sources_of(s, q.shape[3], tail)
    gluon_forward[call.attention_grid](
        q, out, nonfinite, keys, values, s["k_scales"], s["v_scales"] if call.values_scaled else None,
        pooled_k, pooled_v, s["pooled_scales"] if tail else None, s["pool_bias"] if tail else None, piece.tail_bias,
        pattern.tables, piece.order_of_head, piece.kept_words if tail else None, *piece.listed(s),
        *q.stride()[:3], *out.stride()[:3],
        heads, heads // piece.k.shape[1], g.grid_tokens, g.prefix, g.length, call.q_blocks, call.q_blocks_grid,
        call.blocks, g.k_blocks, call.pools, call.stretches, scale_log2, **call.attention_options,
    )  # fmt: skip


def schedule_of(dim: int, precision: Precision, listed: bool) -> int:
    """How firmly a step is held in order (`key_steps.key_steps`): as far as registers allow without many spills."""
    plain, marked, ahead = range(3)
    if (dim, precision) != (128, FP8):
        return ahead
    return plain if listed else marked


def options(dim: int, precision: Precision, listed: bool, tail: bool) -> dict:
    """Constants and launch options of the kernel."""
    return {
        "D": dim, "P_LOG2": precision.weights_log2, "LISTED": listed, "TAIL": tail, "STAGES": STAGES,
        "SCHEDULE": schedule_of(dim, precision, listed),
        "num_warps": 4, "maxnreg": REGISTERS, "enable_fp_fusion": True,
    }  # fmt: skip
