"""The block-sparse attention kernel: INT8 (or 16-bit) Q K^T over a list of kept blocks, one of three P V products.

One program computes a tile of query rows of one head. It gathers and quantises its own rows of Q (each row is read
once, so a separate pass over Q would only move bytes), walks the head's kept key blocks, adds the pooled tail, and
scatters the result to the rows where the tokens came from. K and V come reordered from `triton_prepass`.
"""

import triton
import triton.language as tl

from .triton_common import MAGIC, MAGIC_BITS, quantized_queries, round_to_int8, source_rows

BLOCK = tl.constexpr(64)
# INT8 P is scaled to 127 at the row's maximum; the rounding of the folded constant can push it past 127.5, which
# wraps to -128. Lowering everything by four units of the integer score costs nothing and rules that out.
WRAP_MARGIN = tl.constexpr(4.0)


@triton.jit
def _scores(q, k_block, k_scale, q_scale, key_bias, columns, valid, PADDED_D, QK, BIASED, MASKED):
    """(raw, scale, base) of one block: the score in log2 units is (raw - base) * scale, [rows, 64]."""
    offsets = columns[:, None] * PADDED_D + tl.arange(0, PADDED_D)[None, :]
    product = tl.dot(q, tl.trans(tl.load(k_block + offsets)))
    if QK == "16":
        raw = product
    else:
        raw = (product + MAGIC_BITS).to(tl.float32, bitcast=True)
    scale = q_scale * tl.load(k_scale)
    if BIASED:
        base = 0.0 if QK == "16" else MAGIC
        raw = (raw - base) * scale[:, None] + tl.load(key_bias + columns)[None, :]
    if MASKED:
        raw = tl.where(columns[None, :] < valid, raw, float("-inf"))
    return raw, scale


@triton.jit
def _row_maximum(raw, scale, QK, BIASED):
    highest = tl.max(raw, 1)
    if not BIASED:
        if QK == "16":
            highest = highest * scale
        else:
            highest = (highest - MAGIC) * scale
    return highest


@triton.jit
def _weights(raw, scale, maximum, P_LOG2: tl.constexpr, QK, BIASED, MARGIN: tl.constexpr):
    """exp2(score - maximum) * 2^P_LOG2: one fused multiply-add and one exponential per element."""
    if BIASED:
        exponent = raw - (maximum - P_LOG2)[:, None]
    elif QK == "16":
        exponent = raw * scale[:, None] - (maximum - P_LOG2)[:, None]
    else:
        exponent = raw * scale[:, None] - (maximum + ((MAGIC + MARGIN) * scale - P_LOG2))[:, None]
    return tl.exp2(exponent)


@triton.jit
def _product(p, v_block, columns, total, first_channel, PADDED_D: tl.constexpr, PV):
    """P V of one block on top of `total`, for as many channels as `total` has from `first_channel` on.

    8-bit V is stored transposed, with the rows of each 16 shuffled.
    """
    channels = first_channel + tl.arange(0, total.shape[1])
    if PV == "16":
        v = tl.load(v_block + columns[:, None] * PADDED_D + channels[None, :])
        result = tl.dot(p.to(v.dtype), v, total)
    else:
        v = tl.trans(tl.load(v_block + channels[:, None] * BLOCK + columns[None, :]))
        # A thread holds score columns {2t, 2t+1, 8+2t, 9+2t} but feeds four consecutive ones to an 8-bit product. V's
        # rows are shuffled to match, so this relabelling moves no data.
        p = tl.reshape(p, [p.shape[0], BLOCK // 16, 2, 4, 2])
        p = tl.reshape(tl.permute(p, [0, 1, 3, 2, 4]), [p.shape[0], BLOCK])
        if PV == "fp8":
            result = tl.dot(p.to(tl.float8e4nv), v, total)
        else:
            result = tl.dot(round_to_int8(p), v, total, out_dtype=tl.int32)
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
        product = _product(p, v_block, columns, _empty_product(accumulator, PV), first_channel, PADDED_D, PV)
        return _join(accumulator, rescale, product, share, PV)


@triton.jit
def _channel_halves(x):
    """Channels 0..D/2 and D/2..D of `[rows, D]`: registers are relabelled, nothing moves."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _whole(x0, x1):
    """The inverse of `_channel_halves`."""
    return tl.reshape(tl.permute(tl.join(x0, x1), [0, 2, 1]), [x0.shape[0], 2 * x0.shape[1]])


@triton.jit
def _one_block(
    accumulator, total, maximum, q, q_scale, block, valid, K, k_scales, V, key_bias, columns,
    PADDED_D: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, P_LOG2: tl.constexpr, MARGIN: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One step of online softmax over one key block."""
    raw, scale = _scores(
        q, K + block * (BLOCK * PADDED_D), k_scales + block, q_scale, key_bias + block * BLOCK, columns, valid,
        PADDED_D, QK, BIASED, MASKED,
    )  # fmt: skip
    own = _row_maximum(raw, scale, QK, BIASED)
    highest = tl.maximum(maximum, own)
    rescale = tl.exp2(maximum - highest)
    v_block = V + block * (BLOCK * PADDED_D)
    # Integer weights count from the maximum of their own block; see `_join`.
    top = own if PV == "int8" else highest
    p = _weights(raw, scale, top, P_LOG2, QK, BIASED, MARGIN)
    share = tl.exp2(top - highest)
    if HALVES:
        # mma.sync with fewer rows than channels: Triton would lay the warps side by side over the channels and pass all
        # weights through shared memory (22 issue slots instead of 15). Square products keep each warp on its own rows.
        low, high = _channel_halves(accumulator)
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
def _halves(x):
    """Columns 0..63 and 64..127 of `[rows, 128]`: registers are relabelled, nothing moves."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, BLOCK]), [0, 2, 1]))


@triton.jit
def _two_blocks(
    accumulator, total, maximum, q, q_scale, first, second, K, k_scales, V, key_bias, columns,
    PADDED_D: tl.constexpr, QK: tl.constexpr, PV: tl.constexpr, P_LOG2: tl.constexpr, MARGIN: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """As `_one_block` for two key blocks at once: one maximum and one rescaling per 128 keys, scales stay scalars."""
    both = tl.arange(0, 2 * BLOCK)
    # The part that does not change stays apart from the part that does, so that it is computed once.
    inside = (both % BLOCK)[:, None] * PADDED_D + tl.arange(0, PADDED_D)[None, :]
    offsets = tl.where(both < BLOCK, first * (BLOCK * PADDED_D), second * (BLOCK * PADDED_D))[:, None] + inside
    product = tl.dot(q, tl.trans(tl.load(K + offsets)))
    if QK == "16":
        raw = product
    else:
        raw = (product + MAGIC_BITS).to(tl.float32, bitcast=True)
    raw0, raw1 = _halves(raw)
    scale0 = q_scale * tl.load(k_scales + first)
    scale1 = q_scale * tl.load(k_scales + second)
    if BIASED:
        base = 0.0 if QK == "16" else MAGIC
        raw0 = (raw0 - base) * scale0[:, None] + tl.load(key_bias + first * BLOCK + columns)[None, :]
        raw1 = (raw1 - base) * scale1[:, None] + tl.load(key_bias + second * BLOCK + columns)[None, :]
    pair_maximum = tl.maximum(_row_maximum(raw0, scale0, QK, BIASED), _row_maximum(raw1, scale1, QK, BIASED))
    highest = tl.maximum(maximum, pair_maximum)
    # Integer weights count from the maximum of their own 128 keys; see `_join`.
    top = pair_maximum if PV == "int8" else highest
    rescale = tl.exp2(maximum - highest)
    v0 = V + first * (BLOCK * PADDED_D)
    v1 = V + second * (BLOCK * PADDED_D)
    p0 = _weights(raw0, scale0, top, P_LOG2, QK, BIASED, MARGIN)
    # The second block's exponentials come after the first block's product is issued and run beside it.
    if PV == "16":
        accumulator = _product(p0, v0, columns, accumulator * rescale[:, None], 0, PADDED_D, PV)
        p1 = _weights(raw1, scale1, top, P_LOG2, QK, BIASED, MARGIN)
        accumulator = _product(p1, v1, columns, accumulator, 0, PADDED_D, PV)
    else:
        product = _product(p0, v0, columns, _empty_product(accumulator, PV), 0, PADDED_D, PV)
        p1 = _weights(raw1, scale1, top, P_LOG2, QK, BIASED, MARGIN)
        product = _product(p1, v1, columns, product, 0, PADDED_D, PV)
    added = tl.sum(p0 + p1, 1)
    share = tl.exp2(top - highest)
    if PV != "16":
        accumulator = _join(accumulator, rescale, product, share, PV)
    if PV == "int8":
        added *= share
    return accumulator, total * rescale + added, highest


@triton.jit
def _tail(
    accumulator, total, maximum, q, q_scale, kept_words, bias, pooled_k, pooled_scales, pooled_v, grid_tokens, pools,
    columns, PADDED_D: tl.constexpr, QK: tl.constexpr, P_LOG2: tl.constexpr, POOL: tl.constexpr,
    SEPARATE: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the pooled keys of dropped blocks: score + log2(tokens in the pool) + bias.

    kept_words: this row's mask as int64 words, bit b of word w for key block 64 w + b.
    """
    channels = tl.arange(0, PADDED_D)
    PER_BLOCK: tl.constexpr = BLOCK // POOL
    last_bias = bias + tl.log2((grid_tokens - (pools - 1) * POOL).to(tl.float32))
    bias += tl.log2(POOL * 1.0)
    word = tl.load(kept_words)
    for start in tl.range(0, pools, BLOCK, num_stages=STAGES):
        next_word = tl.load(kept_words + (start + BLOCK) // (PER_BLOCK * 64))
        # A column's bit by 32-bit shifts: 64-bit ones would cost more than the exponential.
        bits = word >> (start // PER_BLOCK % 64)
        bit = columns // PER_BLOCK
        kept = (tl.where(bit < 32, bits.to(tl.int32), (bits >> 32).to(tl.int32)) >> (bit % 32)) & 1
        pool = start + columns
        pool_bias = tl.where(pool < pools - 1, bias, last_bias)
        pool_bias = tl.where((pool < pools) & (kept == 0), pool_bias, float("-inf"))
        offsets = pool[:, None] * PADDED_D + channels[None, :]
        product = tl.dot(q, tl.trans(tl.load(pooled_k + offsets))).to(tl.float32)
        score = product * tl.load(pooled_scales + pool)[None, :] * q_scale[:, None] + pool_bias[None, :]
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
            low, high = _channel_halves(accumulator)
            low = _accumulate(low, rescale, rescale, p, pooled_v, pool, 0, PADDED_D, "16")
            high = _accumulate(high, rescale, rescale, p, pooled_v, pool, PADDED_D // 2, PADDED_D, "16")
            accumulator = _whole(low, high)
        else:
            accumulator = _accumulate(accumulator, rescale, rescale, p, pooled_v, pool, 0, PADDED_D, "16")
        maximum = highest
        word = next_word
    return accumulator, total


@triton.jit(
    do_not_specialize=[
        "heads",
        "group",
        "grid_tokens",
        "prefix",
        "length",
        "q_blocks",
        "q_blocks_grid",
        "k_blocks",
        "k_blocks_grid",
        "pools",
    ]
)
def attention_forward(
    Q, OUT, nonfinite, q_scales, K, V, k_scales, v_scales, key_bias,
    pooled_k, pooled_v, pooled_scales, tail_bias,
    tables, order_of_head, rotation, kept_words, head_order, row_order, list_start, list_full, list_all, block_list,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_ob, stride_oh, stride_ol,
    heads, group, grid_tokens, prefix, length, q_blocks, q_blocks_grid, k_blocks, k_blocks_grid, pools, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, PAIRS: tl.constexpr,
    QK: tl.constexpr, PV: tl.constexpr, P_LOG2: tl.constexpr, LISTED: tl.constexpr, TAIL: tl.constexpr,
    POOL: tl.constexpr, BIASED: tl.constexpr, ROTATE: tl.constexpr, VALUES_SCALED: tl.constexpr,
    SEPARATE_TAIL: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS query rows of one (batch, head). See `attention.forward` for every argument.

    Grid: (batch * heads * q_blocks * (BLOCK_Q / ROWS),). The programs of a head run together, so that its K and V
    stay in the L2 cache: densest heads first, and in a head the longest rows first.
    """
    TILES: tl.constexpr = BLOCK_Q // ROWS
    program = tl.program_id(0)
    items = heads * q_blocks
    batch = program // (items * TILES)
    item = program % (items * TILES)
    tile = item % TILES
    head = item // TILES // q_blocks
    q_block = item // TILES % q_blocks
    if LISTED:
        head = tl.load(head_order + head)
        q_block = tl.load(row_order + head * q_blocks + q_block)
    kv_head = batch * (heads // group) + head // group
    order = tl.load(order_of_head + head // group)

    positions = q_block * BLOCK_Q + tile * ROWS + tl.arange(0, ROWS)
    rows = source_rows(
        tables + order.to(tl.int64) * grid_tokens, positions, grid_tokens, q_blocks_grid * BLOCK_Q, prefix, length
    )
    q_head = Q + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q, q_scale = quantized_queries(q_head, rows, stride_ql, stride_qd, rotation, scale_log2, D, PADDED_D, QK, ROTATE)

    # Through memory and back: a loaded tile goes to the tensor cores from shared memory, and a loaded scale is laid out
    # as the scores are; as computed values both would be converted in every step. The tile waits in the rows of the
    # output that this program overwrites at the end.
    out_head = OUT + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    waiting = out_head.to(tl.pointer_type(q.dtype), bitcast=True)
    PER_ELEMENT: tl.constexpr = OUT.dtype.element_ty.primitive_bitwidth // q.dtype.primitive_bitwidth
    channels = tl.arange(0, PADDED_D)
    waiting += rows[:, None].to(tl.int64) * (stride_ol * PER_ELEMENT) + channels[None, :]
    real = (rows[:, None] >= 0) & (channels[None, :] < D)
    scales = q_scales + ((batch * heads + head) * q_blocks + q_block).to(tl.int64) * BLOCK_Q + tile * ROWS
    tl.store(waiting, q, real)
    tl.store(scales + tl.arange(0, ROWS), q_scale)
    tl.debug_barrier()
    q = tl.load(waiting, real, other=0)
    q_scale = tl.load(scales + tl.arange(0, ROWS))

    K += kv_head.to(tl.int64) * k_blocks * (BLOCK * PADDED_D)
    V += kv_head.to(tl.int64) * k_blocks * (BLOCK * PADDED_D)
    k_scales += kv_head * k_blocks
    key_bias += kv_head.to(tl.int64) * k_blocks * BLOCK
    columns = tl.arange(0, BLOCK)
    MARGIN: tl.constexpr = WRAP_MARGIN if PV == "int8" else 0.0

    # Keys that fill their block only in part: the last block of the grid and the last of the context.
    grid_valid = grid_tokens - (k_blocks_grid - 1) * BLOCK
    context_valid = length - grid_tokens - (k_blocks - k_blocks_grid - 1) * BLOCK
    ragged_grid = tl.where(grid_valid < BLOCK, 1, 0)
    if LISTED:
        # Context rows (q_block >= q_blocks_grid) share one list of all blocks.
        row = head * (q_blocks_grid + 1) + tl.minimum(q_block, q_blocks_grid)
        blocks = block_list + tl.load(list_start + row)
        full = tl.load(list_full + row)
        count = tl.load(list_all + row)
    else:
        # Without a list: the full blocks of the grid, those of the context, then the ragged ones.
        ragged_context = tl.where((k_blocks > k_blocks_grid) & (context_valid < BLOCK), 1, 0)
        full = k_blocks - ragged_grid - ragged_context
        count = k_blocks
    full_grid = k_blocks_grid - ragged_grid

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, PADDED_D], tl.float32)
    if PAIRS:
        done = full // 2 * 2
        # The next indices are carried: a load that feeds an address inside the same iteration would take the
        # pipeline stage that K and V need. The list is padded, so reading past the end of a row is harmless.
        if LISTED:
            first = tl.load(blocks).to(tl.int32)
            second = tl.load(blocks + 1).to(tl.int32)
        else:
            first = tl.where(full_grid > 0, 0, ragged_grid)
            second = tl.where(full_grid > 1, 1, 1 + ragged_grid)
        for i in tl.range(0, done, 2, num_stages=STAGES):
            if LISTED:
                next_first = tl.load(blocks + i + 2).to(tl.int32)
                next_second = tl.load(blocks + i + 3).to(tl.int32)
            else:
                next_first = i + 2 + tl.where(i + 2 >= full_grid, ragged_grid, 0)
                next_second = i + 3 + tl.where(i + 3 >= full_grid, ragged_grid, 0)
            accumulator, total, maximum = _two_blocks(
                accumulator, total, maximum, q, q_scale, first, second, K, k_scales, V, key_bias, columns,
                PADDED_D, QK, PV, P_LOG2, MARGIN, BIASED,
            )  # fmt: skip
            first = next_first
            second = next_second
    else:
        done = full
        if LISTED:
            block = tl.load(blocks).to(tl.int32)
        else:
            block = tl.where(full_grid > 0, 0, ragged_grid)
        for i in tl.range(0, done, num_stages=STAGES):
            if LISTED:
                next_block = tl.load(blocks + i + 1).to(tl.int32)
            else:
                next_block = i + 1 + tl.where(i + 1 >= full_grid, ragged_grid, 0)
            accumulator, total, maximum = _one_block(
                accumulator, total, maximum, q, q_scale, block, BLOCK, K, k_scales, V, key_bias, columns,
                PADDED_D, QK, PV, P_LOG2, MARGIN, BIASED, False, HALVES,
            )  # fmt: skip
            block = next_block

    # What is left: the odd full block and the ragged ones, at most three.
    for i in tl.range(done, count, num_stages=1):
        if LISTED:
            block = tl.load(blocks + i).to(tl.int32)
        else:
            block = i + tl.where(i >= full_grid, ragged_grid, 0)
            # Behind the full blocks: the ragged block of the grid (if any), then that of the context.
            block = tl.where(
                i >= full, tl.where((i == full) & (ragged_grid > 0), k_blocks_grid - 1, k_blocks - 1), block
            )
        valid = tl.where(block == k_blocks_grid - 1, grid_valid, tl.where(block == k_blocks - 1, context_valid, BLOCK))
        accumulator, total, maximum = _one_block(
            accumulator, total, maximum, q, q_scale, block, valid, K, k_scales, V, key_bias, columns,
            PADDED_D, QK, PV, P_LOG2, MARGIN, BIASED, True, HALVES,
        )  # fmt: skip

    if TAIL:
        if q_block < q_blocks_grid:
            pool_block = kv_head.to(tl.int64) * ((pools + BLOCK - 1) // BLOCK)
            accumulator, total = _tail(
                accumulator, total, maximum, q, q_scale,
                kept_words + (head * q_blocks_grid + q_block) * ((k_blocks_grid + 63) // 64 + 1),
                tl.load(tail_bias + head) * 1.4426950408889634,
                pooled_k + pool_block * (BLOCK * PADDED_D), pooled_scales + pool_block * BLOCK,
                pooled_v + pool_block * (BLOCK * PADDED_D), grid_tokens, pools, columns,
                PADDED_D, QK, P_LOG2, POOL, SEPARATE_TAIL, HALVES, TAIL_STAGES,
            )  # fmt: skip

    # Looked up again rather than kept in registers across the loops.
    rows = source_rows(
        tables + order.to(tl.int64) * grid_tokens, positions, grid_tokens, q_blocks_grid * BLOCK_Q, prefix, length
    )
    channels = tl.arange(0, PADDED_D)
    result = accumulator / total[:, None]
    if VALUES_SCALED:
        result *= tl.load(v_scales + kv_head * PADDED_D + channels)[None, :]
    result = result.to(OUT.dtype.element_ty)
    real = (rows[:, None] >= 0) & (channels[None, :] < D)
    target = out_head + rows[:, None].to(tl.int64) * stride_ol + channels[None, :]
    tl.store(target, result, real)
    if nonfinite is not None:
        # Zero, or NaN where a channel is NaN or infinite. Row by row: one answer for the tile would cost registers.
        broken = tl.sum(result.to(tl.float32) * 0.0, 1) != 0.0
        tl.store(nonfinite + tl.zeros([ROWS], tl.int32), 1, broken)
