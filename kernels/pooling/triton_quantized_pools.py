"""Expanded pools as the attention kernels read them: smoothed, rotated and quantised like the keys they stand for.

Smoothing and rotation are linear, so they are done to the pools, which are few, rather than to the keys before. The
PyTorch counterparts are `pooling.reference` and `attention.reference`.
Import only where a launch is wanted: this module needs Triton.
"""

import triton
import triton.language as tl

from ..core.settled import settle
from ..core.triton_math import packed, power_of_two_at_least, round_to_int8
from .triton_pools import SETS, block_of_keys, load_means, pools_around

# Keys of a program; rows that pools are rounded up to.
BLOCK = tl.constexpr(64)


@triton.jit
def _rotated(x, matrix):
    """x times a matrix of +-1: float32 `[SETS, D]`, with 16-bit tensor products in two parts, good to 16 bits more."""
    high = x.to(matrix.dtype)
    product = tl.dot(high, matrix, input_precision="ieee")
    if matrix.dtype != tl.float32:
        product = tl.dot((x - high.to(tl.float32)).to(matrix.dtype), matrix, product)
    return product


@triton.jit
def _quantized_rows(keys, QK: tl.constexpr, PACKED: tl.constexpr):
    """What is to be stored of keys float32 `[SETS, D]`, and the scale of it: one for each row, for pools are smaller
    than the keys they stand for."""
    UNIT: tl.constexpr = 16.0 if PACKED else 1.0
    largest = tl.maximum(tl.max(tl.abs(keys), 1), 1e-12)
    if QK == "16":
        scale = power_of_two_at_least(largest)
        return keys / scale[:, None], scale
    else:
        LEVELS: tl.constexpr = 127.0 if QK == "int8" else 7.0
        return round_to_int8(keys * (LEVELS / largest)[:, None]), largest / (LEVELS * UNIT)


@triton.jit(do_not_specialize=["stride_bias", "heads", "group", "tokens", "prefix", "pools", "stretches"])
def store_pools(
    K, V, key_bias, tables, order_of_head, rotation, means, k_means, v_scales,
    pooled_k, pooled_v, pooled_scales, pool_bias,
    stride_kb, stride_kh, stride_kl, stride_kd, stride_vb, stride_vh, stride_vl, stride_vd, stride_bias,
    heads, group, tokens, prefix, pools, stretches, scale_log2, rotation_scale,
    D: tl.constexpr, PADDED_D: tl.constexpr, POOL: tl.constexpr, QK: tl.constexpr, SMOOTH: tl.constexpr,
    ROTATE: tl.constexpr, VALUES_SCALED: tl.constexpr, BIASED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Pools of one block of 64 keys under every mean query of a query head. Grid: (k_blocks, heads, B).

    pooled_k `[B*heads, stretches, pools rounded up to 64, PADDED_D]`, half as wide where PACKED, in the attention's
    Q K^T type; pooled_v 16 bits, in units of v_scales; pooled_scales and pool_bias float32, one for each row, in log2
    units. The last block also stores what is behind the pools and weighs nothing. k_means and v_scales: what the
    pre-pass has left; means: `launch_mean_queries`, None for plain means; scale_log2: of raw queries and keys.
    """
    batch, head = tl.program_id(2), tl.program_id(1)
    kv_head = batch * (heads // group) + head // group
    entry = batch * heads + head
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, BLOCK)
    table = tables + tl.load(order_of_head + head // group).to(tl.int64) * tokens
    K += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    V += batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
    k, v, bias, real = block_of_keys(
        K, V, key_bias, table, batch, stride_kl, stride_kd, stride_vl, stride_vd, stride_bias, tokens, prefix,
        D, PADDED_D, BLOCK, BIASED,
    )  # fmt: skip
    m = load_means(means, entry, stretches, channels, PADDED_D).to(k.dtype)
    # The mean queries in the space of what is stored.
    seen_m = m.to(tl.float32)
    mean_key = tl.zeros([PADDED_D], tl.float32)
    if ROTATE:
        matrix = tl.load(rotation + channels[:, None] * PADDED_D + channels[None, :])
        seen_m = tl.dot(m, matrix, input_precision="ieee") * rotation_scale
    if SMOOTH:
        mean_key = tl.load(k_means + kv_head * PADDED_D + channels)
    # All logits of a row are less by what the mean key would have, whether of keys or of pools.
    missing = tl.sum(seen_m * mean_key[None, :], 1)
    if VALUES_SCALED:
        per_unit = 1.0 / tl.load(v_scales + kv_head * PADDED_D + channels)

    stretch = tl.arange(0, SETS)
    there = stretch < stretches
    rows = (pools + BLOCK - 1) // BLOCK * BLOCK
    K_ROW: tl.constexpr = PADDED_D // 2 if PACKED else PADDED_D
    for part in tl.static_range(BLOCK // POOL):
        pool = tl.program_id(0) * (BLOCK // POOL) + part
        keys, values, weight = pools_around(m, k, v, bias, real & (columns // POOL == part), scale_log2, BIASED)
        if ROTATE:
            keys = _rotated(keys, matrix) * rotation_scale
        quantized, scale = _quantized_rows(keys - mean_key[None, :], QK, PACKED)
        stored = quantized.to(pooled_k.dtype.element_ty)
        worth = stored.to(tl.float32) * (scale * (16.0 if PACKED else 1.0))[:, None]
        at_mean = (tl.sum(seen_m * worth, 1) + missing) * scale_log2
        at = (entry.to(tl.int64) * stretches + stretch) * rows + pool
        wanted = there & (pool < pools)
        tl.store(pooled_scales + at, scale, wanted)
        tl.store(pool_bias + at, weight - at_mean, wanted)
        if PACKED:
            stored = packed(stored)
        key_cells = at[:, None] * K_ROW + tl.arange(0, K_ROW)[None, :]
        tl.store(pooled_k + key_cells, stored, wanted[:, None])
        if VALUES_SCALED:
            values *= per_unit[None, :]
        cells = at[:, None] * PADDED_D + channels[None, :]
        tl.store(pooled_v + cells, values.to(pooled_v.dtype.element_ty), wanted[:, None])
    if tl.program_id(0) == tl.num_programs(0) - 1:
        behind = rows - BLOCK + tl.arange(0, BLOCK)
        gone = behind >= pools
        # Zero: nothing that is not a number may meet the weight of zero.
        no_keys = tl.zeros([BLOCK, K_ROW], tl.float32).to(pooled_k.dtype.element_ty)
        no_values = tl.zeros([BLOCK, PADDED_D], tl.float32).to(pooled_v.dtype.element_ty)
        for i in range(0, stretches):
            row = (entry.to(tl.int64) * stretches + i) * rows + behind
            tl.store(pooled_scales + row, tl.zeros([BLOCK], tl.float32), gone)
            tl.store(pool_bias + row, tl.full([BLOCK], float("-inf"), tl.float32), gone)
            tl.store(pooled_k + row[:, None] * K_ROW + tl.arange(0, K_ROW)[None, :], no_keys, gone[:, None])
            tl.store(pooled_v + row[:, None] * PADDED_D + channels[None, :], no_values, gone[:, None])


settle(globals())
