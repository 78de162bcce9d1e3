"""The pre-pass: channel statistics of K and V, then reorder, smooth, rotate and quantise them in one read each.

K becomes `[B, Hkv, blocks, 64, D]`, one scale per block; V becomes the same in 16 bits, or `[B, Hkv, blocks, D, 64]`
with shuffled rows in 8 bits (see `triton_softmax_steps._product`), one scale per channel. Padding is zero. PACKED:
4-bit keys are two values a byte, `[..., D / 2]`, in units of a sixteenth (see `triton_math.for_packed_keys`).
"""

import triton
import triton.language as tl

from ..core.settled import settle
from ..core.triton_math import packed, power_of_two_at_least, round_to_int8, source_rows

BLOCK = tl.constexpr(64)
CHUNKS_AT_ONCE = tl.constexpr(16)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["length", "kv_heads"])
def channel_statistics(
    K, V, sums, largest,
    stride_kb, stride_kh, stride_kl, stride_kd, stride_vb, stride_vh, stride_vl, stride_vd, length, kv_heads,
    D: tl.constexpr, PADDED_D: tl.constexpr, CHUNK: tl.constexpr, SUM_EVERY: tl.constexpr, NEED_MAX: tl.constexpr,
):  # fmt: skip
    """Per chunk of CHUNK rows: sum of K and largest |V| per channel, float32 `[B*Hkv, chunks, PADDED_D]`.

    The sum takes every SUM_EVERY-th block of 64 rows (0: none).

    Grid: (chunks, Hkv, B). Partial results instead of atomics: the same input gives the same bits every time.
    """
    head = tl.program_id(2).to(tl.int64) * kv_heads + tl.program_id(1)
    channels = tl.arange(0, PADDED_D)
    K += tl.program_id(2).to(tl.int64) * stride_kb + tl.program_id(1).to(tl.int64) * stride_kh
    V += tl.program_id(2).to(tl.int64) * stride_vb + tl.program_id(1).to(tl.int64) * stride_vh
    sum_k = tl.zeros([BLOCK, PADDED_D], tl.float32)
    max_v = tl.zeros([BLOCK, PADDED_D], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        rows = tl.program_id(0) * CHUNK + start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < length) & (channels[None, :] < D)
        wide_rows = rows[:, None].to(tl.int64)
        if SUM_EVERY > 0 and start % (64 * SUM_EVERY) == 0:
            sum_k += tl.load(K + wide_rows * stride_kl + channels[None, :] * stride_kd, mask, other=0.0).to(tl.float32)
        if NEED_MAX:
            v = tl.load(V + wide_rows * stride_vl + channels[None, :] * stride_vd, mask, other=0.0).to(tl.float32)
            max_v = tl.maximum(max_v, tl.abs(v))
    partial = (head * tl.num_programs(0) + tl.program_id(0)) * PADDED_D + channels
    if SUM_EVERY > 0:
        tl.store(sums + partial, tl.sum(sum_k, 0))
    if NEED_MAX:
        tl.store(largest + partial, tl.max(max_v, 0))


@triton.jit
def _mean_key(sums, head, chunks, sampled_rows, PADDED_D: tl.constexpr):
    """Mean key of a head, float32 `[PADDED_D]`, from what `channel_statistics` left."""
    channels = tl.arange(0, PADDED_D)
    total = tl.zeros([CHUNKS_AT_ONCE, PADDED_D], tl.float32)
    for start in range(0, chunks, CHUNKS_AT_ONCE):
        chunk = start + tl.arange(0, CHUNKS_AT_ONCE)
        offsets = (head.to(tl.int64) * chunks + chunk)[:, None] * PADDED_D + channels[None, :]
        total += tl.load(sums + offsets, (chunk < chunks)[:, None], other=0.0)
    return tl.sum(total, 0) / sampled_rows


@triton.jit
def _value_scales(largest, head, chunks, PADDED_D: tl.constexpr, PV: tl.constexpr, V_LEVELS: tl.constexpr):
    """What one unit of stored V stands for, per channel of a head, float32 `[PADDED_D]`."""
    channels = tl.arange(0, PADDED_D)
    most = tl.zeros([CHUNKS_AT_ONCE, PADDED_D], tl.float32)
    for start in range(0, chunks, CHUNKS_AT_ONCE):
        chunk = start + tl.arange(0, CHUNKS_AT_ONCE)
        offsets = (head.to(tl.int64) * chunks + chunk)[:, None] * PADDED_D + channels[None, :]
        most = tl.maximum(most, tl.load(largest + offsets, (chunk < chunks)[:, None], other=0.0))
    scale = tl.maximum(tl.max(most, 0), 1e-12)
    if PV == "16":
        scale = power_of_two_at_least(scale)
    else:
        scale = scale / V_LEVELS
    return scale


@triton.jit(do_not_specialize=["chunks", "sampled_rows"])
def finish_statistics(
    sums, largest, rotation, k_means, v_scales, chunks, sampled_rows, rotation_scale,
    PADDED_D: tl.constexpr, PV: tl.constexpr, SMOOTH: tl.constexpr, ROTATE: tl.constexpr, VALUES_SCALED: tl.constexpr,
    V_LEVELS: tl.constexpr,
):  # fmt: skip
    """Mean key (rotated where the keys are) and value scales, float32 `[B*Hkv, PADDED_D]`. Grid: (B * Hkv,)."""
    head = tl.program_id(0)
    channels = tl.arange(0, PADDED_D)
    if SMOOTH:
        mean = _mean_key(sums, head, chunks, sampled_rows, PADDED_D)
        if ROTATE:
            # Column by column of the symmetric matrix, in float32: the mean is no 16-bit number.
            matrix = tl.load(rotation + channels[:, None] * PADDED_D + channels[None, :]).to(tl.float32)
            mean = tl.sum(matrix * mean[None, :], 1) * rotation_scale
        tl.store(k_means + head * PADDED_D + channels, mean)
    if VALUES_SCALED:
        scale = _value_scales(largest, head, chunks, PADDED_D, PV, V_LEVELS)
        tl.store(v_scales + head * PADDED_D + channels, scale)


@triton.jit(
    do_not_specialize=[
        "stride_bias",
        "kv_heads",
        "grid_tokens",
        "prefix",
        "length",
        "k_blocks",
        "k_blocks_grid",
        "chunks",
        "sampled_rows",
    ]
)
def prepare_keys_values(
    K, V, key_bias, k_out, v_out, bias_out, k_scales, sums, largest, k_means, v_scales,
    tables, order_of_head, rotation,
    stride_kb, stride_kh, stride_kl, stride_kd, stride_vb, stride_vh, stride_vl, stride_vd, stride_bias,
    kv_heads, grid_tokens, prefix, length, k_blocks, k_blocks_grid, chunks, sampled_rows, rotation_scale,
    D: tl.constexpr, PADDED_D: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, V_LEVELS: tl.constexpr,
    SMOOTH: tl.constexpr, ROTATE: tl.constexpr, VALUES_SCALED: tl.constexpr, FINISH: tl.constexpr,
    BIASED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One block of 64 keys and values of one head. Grid: (k_blocks, Hkv, B).

    FINISH: no `finish_statistics` ran; the chunks are few and every program adds them up, the first one of a head
    leaving k_means and v_scales to the kernels that follow.
    """
    UNIT: tl.constexpr = 16.0 if PACKED else 1.0
    block = tl.program_id(0)
    head = tl.program_id(2) * kv_heads + tl.program_id(1)
    channels = tl.arange(0, PADDED_D)
    slots = tl.arange(0, BLOCK)
    order = tl.load(order_of_head + tl.program_id(1)).to(tl.int64)
    rows = source_rows(
        tables + order * grid_tokens, block * BLOCK + slots, grid_tokens, k_blocks_grid * BLOCK, prefix, length
    )
    real = rows >= 0
    mask = real[:, None] & (channels[None, :] < D)
    K += tl.program_id(2).to(tl.int64) * stride_kb + tl.program_id(1).to(tl.int64) * stride_kh
    V += tl.program_id(2).to(tl.int64) * stride_vb + tl.program_id(1).to(tl.int64) * stride_vh
    block_base = (head.to(tl.int64) * k_blocks + block) * (BLOCK * PADDED_D)
    row_major = slots[:, None] * PADDED_D + channels[None, :]

    keys = tl.load(K + rows[:, None].to(tl.int64) * stride_kl + channels[None, :] * stride_kd, mask, other=0.0)
    if ROTATE:
        matrix = tl.load(rotation + channels[:, None] * PADDED_D + channels[None, :])
        # Exact in 16 bits: a number times +-1, summed in float32. "ieee" is for float32 keys.
        k = tl.dot(keys, matrix, input_precision="ieee") * rotation_scale
    else:
        k = keys.to(tl.float32)
    if SMOOTH:
        if FINISH:
            mean = _mean_key(sums, head, chunks, sampled_rows, PADDED_D)
            if block == 0:
                tl.store(k_means + head * PADDED_D + channels, mean)
        else:
            mean = tl.load(k_means + head * PADDED_D + channels)
        k = tl.where(real[:, None], k - mean[None, :], 0.0)
    largest_key = tl.maximum(tl.max(tl.abs(k)), 1e-12)
    if QK == "16":
        scale = power_of_two_at_least(largest_key)
        k_quantized = k / scale
    else:
        K_LEVELS: tl.constexpr = 127.0 if QK == "int8" else 7.0
        scale = largest_key / (K_LEVELS * UNIT)
        k_quantized = round_to_int8(k * (K_LEVELS / largest_key))
    if PACKED:
        half = slots[:, None] * (PADDED_D // 2) + tl.arange(0, PADDED_D // 2)[None, :]
        tl.store(k_out + block_base // 2 + half, packed(k_quantized))
    else:
        tl.store(k_out + block_base + row_major, k_quantized.to(k_out.dtype.element_ty))
    tl.store(k_scales + head * k_blocks + block, scale)

    if BIASED:
        bias = tl.load(key_bias + tl.program_id(2).to(tl.int64) * stride_bias + rows, real, other=0.0).to(tl.float32)
        # Finite: a block whose keys are all hidden must not turn the running maximum into minus infinity.
        bias = tl.maximum(bias * LOG2E, -1e30)
        tl.store(bias_out + (head.to(tl.int64) * k_blocks + block) * BLOCK + slots, bias)

    if PV != "16":
        # Slot a of each 16 takes source row [0,1,8,9, 2,3,10,11, 4,5,12,13, 6,7,14,15][a]; pools of 16 stay together.
        slot = slots % 16
        shuffled = slots - slot + slot % 2 + 8 * (slot // 2 % 2) + 2 * (slot // 4)
        rows = source_rows(
            tables + order * grid_tokens, block * BLOCK + shuffled, grid_tokens, k_blocks_grid * BLOCK, prefix, length
        )
        mask = (rows >= 0)[:, None] & (channels[None, :] < D)
    v = tl.load(V + rows[:, None].to(tl.int64) * stride_vl + channels[None, :] * stride_vd, mask, other=0.0)
    if VALUES_SCALED:
        if FINISH:
            v_scale = _value_scales(largest, head, chunks, PADDED_D, PV, V_LEVELS)
            if block == 0:
                tl.store(v_scales + head * PADDED_D + channels, v_scale)
        else:
            v_scale = tl.load(v_scales + head * PADDED_D + channels)
        v = v.to(tl.float32) * (1.0 / v_scale)[None, :]
    if PV == "16":
        tl.store(v_out + block_base + row_major, v.to(v_out.dtype.element_ty))
    else:
        transposed = channels[:, None] * BLOCK + slots[None, :]
        if PV == "fp8":
            v_quantized = v.to(tl.float8e4nv)
        else:
            v_quantized = round_to_int8(tl.clamp(v, -V_LEVELS, V_LEVELS))
        tl.store(v_out + block_base + transposed, tl.trans(v_quantized))


settle(globals())
