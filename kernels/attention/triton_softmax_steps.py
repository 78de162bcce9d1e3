"""The steps of the block-sparse attention kernel: online softmax over one key block, two of them, or the pooled tail.

Arguments are named as in `triton_forward.attention_forward`.
"""

import triton
import triton.language as tl

from ..core.settled import settle
from ..core.triton_math import MAGIC, MAGIC_BITS, halves, round_to_int8

BLOCK = tl.constexpr(64)
LOG2E = tl.constexpr(1.4426950408889634)
# INT8 P is scaled to 127 at the row's maximum; the rounding of the folded constant can push it past 127.5, which
# wraps to -128. Lowering everything by four units of the integer score costs nothing and rules that out.
WRAP_MARGIN = tl.constexpr(4.0)


@triton.jit
def _products_with_keys(q, q_high, keys, PACKED: tl.constexpr):
    """Q K^T `[rows, keys]` for loaded `keys`, int32 (16 bits: float32). PACKED: see `triton_math.for_packed_keys`."""
    if PACKED:
        product = tl.dot(q_high, tl.trans(keys))
        return tl.dot(q, tl.trans(keys & 15), product, out_dtype=tl.int32)
    else:
        return tl.dot(q, tl.trans(keys))


@triton.jit
def _quick_float(product, QK):
    """The product plus MAGIC as a float: the integer score without a conversion."""
    if QK == "16":
        return product
    else:
        return (product + MAGIC_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _scores(
    q, q_high, k_block, k_scale, q_scale, q_base, key_bias, columns, valid, PADDED_D: tl.constexpr, QK,
    PACKED: tl.constexpr, BIASED, MASKED,
):  # fmt: skip
    """(raw, scale) of one block: scores in log2 units are (raw - q_base) * scale, `[rows, 64]`; with BIASED raw itself.

    q_base: what every raw score of a row has too much, MAGIC or nothing and what packed keys add.
    """
    K_ROW: tl.constexpr = PADDED_D // 2 if PACKED else PADDED_D
    # First the offsets, in 32 bits; as 64-bit pointers to each row they would cost registers.
    offsets = columns[:, None] * K_ROW + tl.arange(0, K_ROW)[None, :]
    keys = tl.load(k_block + offsets)
    raw = _quick_float(_products_with_keys(q, q_high, keys, PACKED), QK)
    scale = q_scale * tl.load(k_scale)
    if BIASED:
        raw = (raw - q_base[:, None]) * scale[:, None] + tl.load(key_bias + columns)[None, :]
    if MASKED:
        raw = tl.where(columns[None, :] < valid, raw, float("-inf"))
    return raw, scale


@triton.jit
def _row_maximum(raw, scale, q_base, QK, BIASED):
    highest = tl.max(raw, 1)
    if not BIASED:
        if QK == "16":
            highest = highest * scale
        else:
            highest = (highest - q_base) * scale
    return highest


@triton.jit
def _weights(raw, scale, q_base, maximum, P_LOG2: tl.constexpr, QK, BIASED, MARGIN: tl.constexpr):
    """exp2(score - maximum) * 2^P_LOG2: one fused multiply-add and one exponential per element."""
    if BIASED:
        exponent = raw - (maximum - P_LOG2)[:, None]
    elif QK == "16":
        # q_base is zero, but a compiler may not drop zero times something.
        exponent = raw * scale[:, None] - (maximum - P_LOG2)[:, None]
    else:
        exponent = raw * scale[:, None] - (maximum + ((q_base + MARGIN) * scale - P_LOG2))[:, None]
    return tl.exp2(exponent)


@triton.jit
def _shuffled(p):
    """Columns of P in the order in which 8-bit V stores its rows.

    A thread holds score columns {2t, 2t+1, 8+2t, 9+2t} but feeds four consecutive ones to an 8-bit product. V's rows
    are shuffled to match, so this relabelling moves no data.
    """
    parted = tl.reshape(p, [p.shape[0], p.shape[1] // 16, 2, 4, 2])
    return tl.reshape(tl.permute(parted, [0, 1, 3, 2, 4]), [p.shape[0], p.shape[1]])


@triton.jit
def _product(p, v_block, columns, total, first_channel, PADDED_D: tl.constexpr, PV):
    """P V of one block on top of `total`, for as many channels as `total` has from `first_channel` on.

    8-bit V is stored transposed, the rows of each 16 shuffled.
    """
    channels = first_channel + tl.arange(0, total.shape[1])
    if PV == "16":
        v = tl.load(v_block + columns[:, None] * PADDED_D + channels[None, :])
        result = tl.dot(p.to(v.dtype), v, total)
    else:
        v = tl.trans(tl.load(v_block + channels[:, None] * BLOCK + columns[None, :]))
        if PV == "fp8":
            result = tl.dot(_shuffled(p).to(tl.float8e4nv), v, total)
        else:
            result = tl.dot(round_to_int8(_shuffled(p)), v, total, out_dtype=tl.int32)
    return result


@triton.jit
def _empty_product(accumulator, PV):
    """8-bit products are added up in a block of their own and then joined in fp32, two-level accumulation: the tensor
    cores' own fp8 accumulator is too short, and the joining multiply-add replaces the rescaling multiply."""
    return tl.zeros_like(accumulator) if PV == "fp8" else tl.zeros(accumulator.shape, tl.int32)


@triton.jit
def _join(accumulator, rescale, product, share, PV):
    """accumulator * rescale + product * share, rows apart; share is 1 in FP8.

    Integer weights are 127 at the maximum of their own block, not of the row so far: over a long row of even scores
    most blocks lie far below the row's maximum and would be left with one or two levels.
    """
    if PV == "fp8":
        return tl.fma(accumulator, tl.zeros_like(accumulator) + rescale[:, None], product)
    else:
        wide = tl.zeros_like(accumulator) + share[:, None]
        return tl.fma(product.to(tl.float32), wide, accumulator * rescale[:, None])


@triton.jit
def _accumulate(accumulator, rescale, share, p, v_block, columns, first_channel, PADDED_D: tl.constexpr, PV):
    """accumulator * rescale + P V of one block, for the accumulator's channels."""
    if PV == "16":
        return _product(p, v_block, columns, accumulator * rescale[:, None], first_channel, PADDED_D, PV)
    else:
        empty = _empty_product(accumulator, PV)
        product = _product(p, v_block, columns, empty, first_channel, PADDED_D, PV)
        return _join(accumulator, rescale, product, share, PV)


@triton.jit
def _whole(x0, x1):
    """The inverse of `triton_math.halves`."""
    return tl.reshape(tl.permute(tl.join(x0, x1), [0, 2, 1]), [x0.shape[0], 2 * x0.shape[1]])


@triton.jit
def one_block(
    accumulator, total, maximum, q, q_high, q_scale, q_base, block, valid, K, k_scales, V, key_bias, columns,
    PADDED_D: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, P_LOG2: tl.constexpr, PACKED: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One step of online softmax over one key block."""
    K_BLOCK: tl.constexpr = BLOCK * PADDED_D // 2 if PACKED else BLOCK * PADDED_D
    MARGIN: tl.constexpr = WRAP_MARGIN if PV == "int8" else 0.0
    raw, scale = _scores(
        q, q_high, K + block * K_BLOCK, k_scales + block, q_scale, q_base, key_bias + block * BLOCK, columns, valid,
        PADDED_D, QK, PACKED, BIASED, MASKED,
    )  # fmt: skip
    own = _row_maximum(raw, scale, q_base, QK, BIASED)
    highest = tl.maximum(maximum, own)
    rescale = tl.exp2(maximum - highest)
    v_block = V + block * (BLOCK * PADDED_D)
    # Integer weights count from the maximum of their own block; see `_join`.
    top = own if PV == "int8" else highest
    p = _weights(raw, scale, q_base, top, P_LOG2, QK, BIASED, MARGIN)
    share = tl.exp2(top - highest)
    if HALVES:
        # mma.sync with fewer rows than channels: Triton would lay the warps side by side over the channels and pass all
        # weights through shared memory (22 issue slots instead of 15). Square products keep each warp on its own rows.
        low, high = halves(accumulator)
        low = _accumulate(low, rescale, share, p, v_block, columns, 0, PADDED_D, PV)
        high = _accumulate(high, rescale, share, p, v_block, columns, PADDED_D // 2, PADDED_D, PV)
        accumulator = _whole(low, high)
    else:
        accumulator = _accumulate(accumulator, rescale, share, p, v_block, columns, 0, PADDED_D, PV)
    added = tl.sum(p, 1)
    if PV == "int8":
        added *= share
    return accumulator, total * rescale + added, highest


@triton.jit
def two_blocks(
    accumulator, total, maximum, q, q_high, q_scale, q_base, first, second, K, k_scales, V, key_bias, columns,
    PADDED_D: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, P_LOG2: tl.constexpr, PACKED: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """As `one_block` for two key blocks at once: one maximum and one rescaling per 128 keys, scales stay scalars."""
    K_ROW: tl.constexpr = PADDED_D // 2 if PACKED else PADDED_D
    MARGIN: tl.constexpr = WRAP_MARGIN if PV == "int8" else 0.0
    both = tl.arange(0, 2 * BLOCK)
    # The part that does not change stays apart from the part that does, so that it is computed once.
    inside = (both % BLOCK)[:, None] * K_ROW + tl.arange(0, K_ROW)[None, :]
    offsets = tl.where(both < BLOCK, first * (BLOCK * K_ROW), second * (BLOCK * K_ROW))[:, None] + inside
    raw = _quick_float(_products_with_keys(q, q_high, tl.load(K + offsets), PACKED), QK)
    raw0, raw1 = halves(raw)
    scale0 = q_scale * tl.load(k_scales + first)
    scale1 = q_scale * tl.load(k_scales + second)
    if BIASED:
        raw0 = (raw0 - q_base[:, None]) * scale0[:, None] + tl.load(key_bias + first * BLOCK + columns)[None, :]
        raw1 = (raw1 - q_base[:, None]) * scale1[:, None] + tl.load(key_bias + second * BLOCK + columns)[None, :]
    maximum0 = _row_maximum(raw0, scale0, q_base, QK, BIASED)
    pair_maximum = tl.maximum(maximum0, _row_maximum(raw1, scale1, q_base, QK, BIASED))
    highest = tl.maximum(maximum, pair_maximum)
    # Integer weights count from the maximum of their own 128 keys; see `_join`.
    top = pair_maximum if PV == "int8" else highest
    rescale = tl.exp2(maximum - highest)
    v0 = V + first * (BLOCK * PADDED_D)
    v1 = V + second * (BLOCK * PADDED_D)
    p0 = _weights(raw0, scale0, q_base, top, P_LOG2, QK, BIASED, MARGIN)
    # The second block's exponentials come after the first block's product is issued and run beside it.
    if PV == "16":
        accumulator = _product(p0, v0, columns, accumulator * rescale[:, None], 0, PADDED_D, PV)
        p1 = _weights(raw1, scale1, q_base, top, P_LOG2, QK, BIASED, MARGIN)
        accumulator = _product(p1, v1, columns, accumulator, 0, PADDED_D, PV)
    else:
        product = _product(p0, v0, columns, _empty_product(accumulator, PV), 0, PADDED_D, PV)
        p1 = _weights(raw1, scale1, q_base, top, P_LOG2, QK, BIASED, MARGIN)
        product = _product(p1, v1, columns, product, 0, PADDED_D, PV)
    added = tl.sum(p0 + p1, 1)
    share = tl.exp2(top - highest)
    if PV != "16":
        accumulator = _join(accumulator, rescale, product, share, PV)
    if PV == "int8":
        added *= share
    return accumulator, total * rescale + added, highest


@triton.jit
def pooled_tail(
    accumulator, total, maximum, q, q_high, q_scale, q_base, kept_words, tail_bias, pooled_k, pooled_scales, pool_bias,
    pooled_v, pools, columns, PADDED_D: tl.constexpr, QK: tl.constexpr, P_LOG2: tl.constexpr, POOL: tl.constexpr,
    PACKED: tl.constexpr, SEPARATE: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the pooled keys of dropped blocks: score + the pool's bias + the head's, in log2 units.

    tail_bias: at the head's, in natural logarithms (`SparsePattern.tail_bias`); pool_bias is in log2 units already.
    kept_words: this row's mask as int64 words, bit b of word w for key block 64 w + b. Behind the last pool, up to a
    multiple of 64, biases are minus infinity.
    """
    K_ROW: tl.constexpr = PADDED_D // 2 if PACKED else PADDED_D
    PER_BLOCK: tl.constexpr = BLOCK // POOL
    word = tl.load(kept_words)
    bias = tl.load(tail_bias) * LOG2E
    for start in tl.range(0, pools, BLOCK, num_stages=STAGES):
        next_word = tl.load(kept_words + (start + BLOCK) // (PER_BLOCK * 64))
        # A column's bit by 32-bit shifts: 64-bit ones would cost more than the exponential.
        bits = word >> (start // PER_BLOCK % 64)
        bit = columns // PER_BLOCK
        kept = (tl.where(bit < 32, bits.to(tl.int32), (bits >> 32).to(tl.int32)) >> (bit % 32)) & 1
        pool = start + columns
        own_bias = tl.where(kept == 0, tl.load(pool_bias + pool) + bias, float("-inf"))
        offsets = pool[:, None] * K_ROW + tl.arange(0, K_ROW)[None, :]
        keys = tl.load(pooled_k + offsets)
        product = _products_with_keys(q, q_high, keys, PACKED).to(tl.float32)
        if PACKED:
            product -= (q_base - MAGIC)[:, None]
        score = product * tl.load(pooled_scales + pool)[None, :] * q_scale[:, None] + own_bias[None, :]
        # `maximum` is finite here: every row has at least one real key behind it.
        highest = tl.maximum(maximum, tl.max(score, 1))
        p = tl.exp2(score - (highest - P_LOG2)[:, None])
        rescale = tl.exp2(maximum - highest)
        total = total * rescale + tl.sum(p, 1)
        if SEPARATE:
            # Beside an 8-bit main loop on sm_90 the other form makes ptxas wait after every single wgmma of the whole
            # kernel (its message C7515).
            product = _product(p, pooled_v, pool, tl.zeros_like(accumulator), 0, PADDED_D, "16")
            accumulator = tl.fma(accumulator, tl.zeros_like(accumulator) + rescale[:, None], product)
        elif HALVES:
            low, high = halves(accumulator)
            low = _accumulate(low, rescale, rescale, p, pooled_v, pool, 0, PADDED_D, "16")
            high = _accumulate(high, rescale, rescale, p, pooled_v, pool, PADDED_D // 2, PADDED_D, "16")
            accumulator = _whole(low, high)
        else:
            accumulator = _accumulate(accumulator, rescale, rescale, p, pooled_v, pool, 0, PADDED_D, "16")
        maximum = highest
        word = next_word
    return accumulator, total


settle(globals())
