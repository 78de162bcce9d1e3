"""Rows of Q, K and V taken straight from the model's tensors by the kernels of the tail: no copy in a head's order.

Import only where a launch is wanted: this module needs Triton. A row of D channels is contiguous, 256 bytes at D = 128
in 16 bits, so taking rows one by one costs as little as a copy that lies in order, which would itself be a pass over
all keys and as much memory. An *entry* is a head of a batch entry, number `batch * heads + head`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .settled import settle

LOG2E = math.log2(math.e)
# Weights are multiplied by 2^15 before they are rounded: of 75,600 equal ones each would be subnormal in fp16.
SHIFT = tl.constexpr(15.0)
UNSHIFT = tl.constexpr(1.0 / 32768.0)


@triton.jit
def valid_keys(block, columns, tokens, context, k_blocks, KEYS: tl.constexpr):
    """Which keys of a block there are: the grid's fill the blocks up to `k_blocks`, the context's those that follow."""
    return block * KEYS + columns < tl.where(block < k_blocks, tokens, k_blocks * KEYS + context)


@triton.jit
def tokens_of(table, block, columns, tokens, prefix, context, k_blocks, KEYS: tl.constexpr):
    """Tokens of the keys of a block, in the head's order and then those of the context, int32.

    Some token of the sequence for keys that are not there, beyond the last block too.
    """
    place = block * KEYS + columns
    valid = valid_keys(block, columns, tokens, context, k_blocks, KEYS)
    on_grid = tl.load(table + place, place < tokens, 0).to(tl.int32)
    outside = place - k_blocks * KEYS
    outside = tl.where(outside < prefix, outside, outside + tokens)
    return tl.where(block < k_blocks, on_grid + prefix, tl.where(valid, outside, 0))


@triton.jit
def load_rows(X, token, stride_l, stride_d, channels, valid, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Rows `token [n]` of X as `[n, PADDED_D]`; zero where not `valid [n]`, and from channel D on."""
    at = X + token.to(tl.int64)[:, None] * stride_l + channels[None, :] * stride_d
    if D == PADDED_D:
        return tl.load(at, valid[:, None], 0.0)
    else:
        return tl.load(at, valid[:, None] & (channels < D)[None, :], 0.0)


@triton.jit
def sixteen_bits(x, unit, WIDE: tl.constexpr):
    """x as it is, or with WIDE (float32) in fp16, divided by the power of two `unit`."""
    if WIDE:
        return (x * (1.0 / unit)).to(tl.float16)
    else:
        return x


@triton.jit
def bias_of(key_bias, batch, stride_bias, token, valid):
    """The bias of keys in log2 units, float32 like token."""
    bias = tl.load(key_bias + batch.to(tl.int64) * stride_bias + token, valid, 0.0).to(tl.float32)
    return tl.maximum(bias * 1.4426950408889634, -1e30)


def units_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """Powers of two by which float32 inputs are divided to fit fp16: float32 `[3, B * Hq]`; None for 16-bit inputs."""
    if q.dtype != torch.float32:
        return None
    # Smallest and largest value: the largest magnitude without a copy of the tensor.
    of_q, *of_keys = (torch.maximum(x.amax((2, 3)), -x.amin((2, 3))) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    largest = torch.stack([of_q, *(x.repeat_interleave(group, 1) for x in of_keys)]).clamp_min(1e-20)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent).flatten(1)


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter stands in for a small one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


settle(globals())
