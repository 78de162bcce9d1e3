"""The attention kernel for sm_90 in Gluon: one warp loads, two warpgroups of 64 query rows compute.

Same call, same scratch and same results as `triton_attention`, where softmax and products wait for each other. Here one
warpgroup can multiply while the other takes exponentials, and both read the K and V that one warp brought into shared
memory (`gluon_ring`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...core.settled import settle
from ...core.triton_math import MAGIC as _MAGIC
from ...core.triton_math import MAGIC_BITS as _MAGIC_BITS
from .pipeline import (
    BLOCK,
    K_EMPTY,
    K_FULL,
    PAIR,
    V_EMPTY,
    V_FULL,
    bar,
    block_at,
    both_blocks,
    first_block,
    next_place,
    produce,
)

MAGIC = gl.constexpr(_MAGIC.value)
MAGIC_BITS = gl.constexpr(_MAGIC_BITS.value)
LOG2E = gl.constexpr(1.4426950408889634)
# Query rows of a warpgroup.
ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
# How a step is held in order; see `_steps`.
PLAIN, MARKED, AHEAD = (gl.constexpr(i) for i in range(3))


@gluon.constexpr_function
def _row_major(D):
    """A warpgroup's layout of `[64, D]` 16-bit rows in memory: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def _mma(columns, bits):
    """A warpgroup's layout of a product `[64, columns]` of operands of so many bits."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 256 // bits])


SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAIR.value, 32]))
HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK.value, 32]))
# One column a thread.
POOL = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _source_rows(table, positions, grid_tokens, grid_padded, prefix, length):
    """As `triton_common.source_rows`."""
    in_grid = positions < grid_tokens
    grid_row = gl.load(table + positions, mask=in_grid, other=0) + prefix
    context = positions - grid_padded
    context_row = gl.where(context < prefix, context, context + grid_tokens)
    in_context = (context >= 0) & (context_row < length)
    return gl.where(in_grid, grid_row, gl.where(in_context, context_row, -1))


@gluon.jit
def _halves(x):
    """Columns 0..63 and 64..127 of `[rows, 128]`: registers are relabelled, nothing moves."""
    x0, x1 = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, BLOCK]), [0, 2, 1]))
    return gl.convert_layout(x0, HALF, assert_trivial=True), gl.convert_layout(x1, HALF, assert_trivial=True)


@gluon.jit
def _packed(p):
    """Weights `[rows, 64]` as e4m3, four to an int32 `[rows, 16]`, in the order in which V's rows are shuffled.

    A thread holds score columns {2t, 2t+1, 8+2t, 9+2t} of each 16 and feeds them as four neighbours: nothing moves.
    """
    p = gl.permute(gl.reshape(p, [ROWS, BLOCK // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    even, odd = gl.split(gl.reshape(p, [ROWS, BLOCK // 4, 2, 2]))
    p0, p2 = gl.split(even)
    p1, p3 = gl.split(odd)
    return gl.inline_asm_elementwise(
        "{.reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high};}",
        "=r,f,f,f,f", [p0, p1, p2, p3], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _stored(p, V_TYPE: gl.constexpr):
    """Weights `[rows, 64]` in V's type, 8-bit ones packed: the compiler takes single bytes apart."""
    if V_TYPE.primitive_bitwidth == 16:
        return p.to(V_TYPE)
    else:
        return _packed(p)


@gluon.jit
def _operand(stored, V_TYPE: gl.constexpr, OUT: gl.constexpr):
    """What `_stored` gave, as the left operand `[rows, 64]` of P V."""
    if V_TYPE.primitive_bitwidth == 16:
        return gl.convert_layout(stored, gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)
    else:
        p0 = stored.to(gl.int8)
        p1 = (stored >> 8).to(gl.int8)
        p2 = (stored >> 16).to(gl.int8)
        p3 = (stored >> 24).to(gl.int8)
        p = gl.reshape(gl.join(gl.join(p0, p2), gl.join(p1, p3)), [ROWS, BLOCK])
        return gl.convert_layout(p.to(V_TYPE, bitcast=True), gl.DotOperandLayout(0, OUT, 4), assert_trivial=True)


@gluon.jit
def _row_maximum(raw, scale, ROW: gl.constexpr):
    return (gl.convert_layout(gl.max(raw, 1), ROW) - MAGIC) * scale


@gluon.jit
def _weights(raw, scale, maximum, P_LOG2: gl.constexpr):
    """exp2(score - maximum) * 2^P_LOG2: one multiply-add and one exponential per element."""
    HALF_ROW: gl.constexpr = gl.SliceLayout(1, HALF)
    offset = gl.convert_layout(maximum + (MAGIC * scale - P_LOG2), HALF_ROW)
    scale = gl.convert_layout(scale, HALF_ROW)
    return gl.exp2(raw * gl.expand_dims(scale, 1) - gl.expand_dims(offset, 1))


@gluon.jit
def _valid(block, plan, valid_of):
    grid_valid, context_valid = valid_of
    return gl.where(block == plan[5] - 1, grid_valid, gl.where(block == plan[6] - 1, context_valid, BLOCK))


@gluon.jit
def _scores(q, buffers, stage):
    """Issues Q K^T of 128 keys."""
    zero = gl.zeros([ROWS, PAIR], gl.int32, SCORES)
    return warpgroup_mma(q, buffers[1].index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _as_float(scores):
    """Integers below 2^22 as floats that are MAGIC too large."""
    return (scores + MAGIC_BITS).to(gl.float32, bitcast=True)


@gluon.jit
def _read(scores, maximum, step, first, second, scale0, scale1, plan, valid_of, MASKED: gl.constexpr):
    """Scores of one step as floats in two halves, and the new row maximum. Masked: columns that hold no key."""
    raw0, raw1 = _halves(_as_float(scores))
    if MASKED:
        columns = gl.expand_dims(gl.arange(0, BLOCK, gl.SliceLayout(0, HALF)), 0)
        # Places behind the list hold copies of its last block.
        valid0 = gl.where(2 * step < plan[2], _valid(first, plan, valid_of), 0)
        valid1 = gl.where(2 * step + 1 < plan[2], _valid(second, plan, valid_of), 0)
        raw0 = gl.where(columns < valid0, raw0, float("-inf"))
        raw1 = gl.where(columns < valid1, raw1, float("-inf"))
    ROW: gl.constexpr = maximum.type.layout
    own = gl.maximum(_row_maximum(raw0, scale0, ROW), _row_maximum(raw1, scale1, ROW))
    return raw0, raw1, gl.maximum(maximum, own)


@gluon.jit
def _joined(accumulator, rescale, product):
    return gl.fma(accumulator, gl.zeros_like(accumulator) + gl.expand_dims(rescale, 1), product)


@gluon.jit
def _wide_product(p0, p1, accumulator, rescale, v0, v1, V_TYPE: gl.constexpr):
    """Issues P V of 128 16-bit values on top of the rescaled accumulator."""
    OUT: gl.constexpr = accumulator.type.layout
    product = accumulator * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, OUT)), 1)
    product = warpgroup_mma(_operand(p0, V_TYPE, OUT), v0, product, is_async=True)
    return warpgroup_mma(_operand(p1, V_TYPE, OUT), v1, product, is_async=True)


@gluon.jit
def _product(
    p0, p1, accumulator, rescale, values, stage, V_TYPE: gl.constexpr, V_LAYOUT: gl.constexpr, D: gl.constexpr
):
    """Issues P V of 128 keys: in 16 bits on top of the rescaled accumulator, in 8 bits apart from it (two levels)."""
    OUT: gl.constexpr = accumulator.type.layout
    if V_TYPE.primitive_bitwidth == 16:
        v0, v1 = both_blocks(values, stage, V_TYPE, BLOCK, D, V_LAYOUT)
        product = _wide_product(p0, p1, accumulator, rescale, v0, v1, V_TYPE)
    else:
        v0, v1 = both_blocks(values, stage, V_TYPE, D, BLOCK, V_LAYOUT)
        product = gl.zeros([ROWS, D], gl.float32, OUT)
        product = warpgroup_mma(_operand(p0, V_TYPE, OUT), v0.permute((1, 0)), product, use_acc=False, is_async=True)
        product = warpgroup_mma(_operand(p1, V_TYPE, OUT), v1.permute((1, 0)), product, is_async=True)
    return product


@gluon.jit
def _steps(
    raw0, raw1, accumulator, total, maximum, rescale, scale0, scale1, k_place, v_place, begin, end,
    q, q_scale, k_scales, buffers, bars, plan, valid_of,
    V_TYPE: gl.constexpr, V_LAYOUT: gl.constexpr, D: gl.constexpr, LISTED: gl.constexpr, MASKED: gl.constexpr,
    STAGES: gl.constexpr, P_LOG2: gl.constexpr, GROUP: gl.constexpr,
    SCHEDULE: gl.constexpr,
):  # fmt: skip
    """Steps begin..end of 128 keys; scores, maximum and rescale of step `begin` are there on entry.

    The next step's Q K^T and this step's P V are issued behind this step's exponentials; the next step's maximum is
    found beside P V. Nothing is under way where an iteration ends: ptxas would serialise all products.
    ptxas moves arithmetic across products and waits as it likes, but no access to shared memory across a barrier. So,
    MARKED: the maximum is stored before a barrier that precedes the wait for P V; else it would be found after it.
    AHEAD: the next Q K^T is issued first, and the maximum read back behind it, so that the exponentials run beside it.
    """
    ROW: gl.constexpr = maximum.type.layout
    mark = buffers[3].index(GROUP)
    for i in range(begin, end):
        top = maximum
        if SCHEDULE == AHEAD:
            mbarrier.wait(bar(bars, K_FULL, k_place[0]), k_place[1])
            scores = _scores(q, buffers, k_place[0])
            top = mark.load(ROW)
        p0 = _weights(raw0, scale0, top, P_LOG2)
        p1 = _weights(raw1, scale1, top, P_LOG2)
        total = total * rescale + gl.convert_layout(gl.sum(p0 + p1, 1), ROW)
        p0 = _stored(p0, V_TYPE)
        p1 = _stored(p1, V_TYPE)
        if SCHEDULE != AHEAD:
            mbarrier.wait(bar(bars, K_FULL, k_place[0]), k_place[1])
            scores = _scores(q, buffers, k_place[0])
        mbarrier.wait(bar(bars, V_FULL, v_place[0]), v_place[1])
        product = _product(p0, p1, accumulator, rescale, buffers[2], v_place[0], V_TYPE, V_LAYOUT, D)

        # Between products and wait: the latencies hide there, and few values are held while registers are short.
        first = block_at(plan, 2 * i + 2, LISTED, not MASKED)
        second = block_at(plan, 2 * i + 3, LISTED, not MASKED)
        next_scale0 = gl.load(k_scales + first)
        next_scale1 = gl.load(k_scales + second)
        scores = warpgroup_mma_wait(2, deps=[scores])
        scale0 = q_scale * next_scale0
        scale1 = q_scale * next_scale1
        raw0, raw1, highest = _read(scores, maximum, i + 1, first, second, scale0, scale1, plan, valid_of, MASKED)
        if SCHEDULE != PLAIN:
            mark.store(highest)
        mbarrier.arrive(bar(bars, K_EMPTY, k_place[0]), count=1)
        # The operands too: their registers must not be written before.
        product, p0, p1 = warpgroup_mma_wait(0, deps=[product, p0, p1])
        mbarrier.arrive(bar(bars, V_EMPTY, v_place[0]), count=1)
        accumulator = product if V_TYPE.primitive_bitwidth == 16 else _joined(accumulator, rescale, product)
        rescale = gl.exp2(maximum - highest)
        maximum = highest
        k_place = next_place(k_place, STAGES)
        v_place = next_place(v_place, STAGES)
    return raw0, raw1, accumulator, total, maximum, rescale, scale0, scale1, k_place, v_place


@gluon.jit
def _pool_set(batch, head, q_block, heads, stretches, q_blocks_grid):
    """Number of the pools that a query block looks at: of its head, around the mean query of its stretch."""
    return (batch * heads + head) * stretches + q_block * stretches // q_blocks_grid


@gluon.jit
def _of_pools(step, pool_scales, pool_bias, kept_words, bias, pools):
    """Key scale and bias of 128 pools, one a thread; minus infinity for pools of kept blocks and behind the last."""
    pool = step * PAIR + gl.arange(0, PAIR, POOL)
    there = pool < pools
    scale = gl.load(pool_scales + pool, mask=there, other=0.0)
    word = gl.load(kept_words + pool // BLOCK, mask=there, other=-1)
    bias += gl.load(pool_bias + pool, mask=there, other=0.0)
    return scale, gl.where((word >> (pool % BLOCK).to(gl.int64)) & 1 == 0, bias, float("-inf"))


@gluon.jit
def _read_pools(scores, maximum, q_scale, scale, bias):
    """Scores of 128 pools in log2 units and the new row maximum, which real keys have made finite before.

    MAGIC times the scale is rounded: less than one step of the integer score.
    """
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    scale = gl.convert_layout(scale, COLUMN)
    bias = gl.convert_layout(bias, COLUMN)
    score = gl.fma(
        _as_float(scores),
        gl.zeros([ROWS, PAIR], gl.float32, SCORES) + gl.expand_dims(scale, 0),
        gl.zeros([ROWS, PAIR], gl.float32, SCORES) - gl.expand_dims(scale * MAGIC, 0),
    )
    row_scale = gl.convert_layout(q_scale, gl.SliceLayout(1, SCORES))
    score = score * gl.expand_dims(row_scale, 1) + gl.expand_dims(bias, 0)
    return score, gl.maximum(maximum, gl.convert_layout(gl.max(score, 1), maximum.type.layout))


@gluon.jit
def _tail(
    accumulator, total, maximum, k_place, v_place, tail, of_tile, start, q, q_scale, buffers, bars,
    VALUE: gl.constexpr, VALUES_LAYOUT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    P_LOG2: gl.constexpr,
):  # fmt: skip
    """Online softmax over the pooled keys of dropped blocks, 128 a step; scheduled as `_steps`, PLAIN.

    A column's scale, bit and bias are found by one thread, a step ahead, and handed round through shared memory: in the
    scores' own layout every thread would do it for 32 columns, for two rows each. P V is of 16 bits in every mode and
    so runs into the accumulator. SPLIT: 128 pooled values fill two places of the ring.
    What follows from the kernel's arguments is worked out here: registers are short in the loops before.
    """
    pool_scales, pool_bias, kept_words, tail_bias, pools, heads, stretches, q_blocks_grid, k_blocks_grid = tail
    batch, head, _ = of_tile
    blocks_of_pools = (pools + BLOCK - 1) // BLOCK
    pool_steps = (blocks_of_pools + 1) // 2
    first = _pool_set(batch, head, start // PAIR, heads, stretches, q_blocks_grid) * blocks_of_pools * BLOCK
    pool_scales += first
    pool_bias += first
    kept_words += (head * q_blocks_grid + start // PAIR) * ((k_blocks_grid + 63) // 64 + 1)
    bias = gl.load(tail_bias + head) * LOG2E
    ROW: gl.constexpr = maximum.type.layout
    ACC: gl.constexpr = accumulator.type.layout
    accumulator = gl.convert_layout(accumulator, _mma(D, 16), assert_trivial=True)
    scale, column_bias = _of_pools(0, pool_scales, pool_bias, kept_words, bias, pools)
    mbarrier.wait(bar(bars, K_FULL, k_place[0]), k_place[1])
    scores = warpgroup_mma_wait(0, deps=[_scores(q, buffers, k_place[0])])
    mbarrier.arrive(bar(bars, K_EMPTY, k_place[0]), count=1)
    k_place = next_place(k_place, STAGES)
    score, highest = _read_pools(scores, maximum, q_scale, scale, column_bias)
    rescale = gl.exp2(maximum - highest)
    maximum = highest
    for i in range(0, pool_steps):
        scale, column_bias = _of_pools(i + 1, pool_scales, pool_bias, kept_words, bias, pools)
        offset = gl.convert_layout(maximum - P_LOG2, gl.SliceLayout(1, SCORES))
        p = gl.exp2(score - gl.expand_dims(offset, 1))
        total = total * rescale + gl.convert_layout(gl.sum(p, 1), ROW)
        p0, p1 = _halves(p)
        p0 = _stored(p0, VALUE)
        p1 = _stored(p1, VALUE)
        mbarrier.wait(bar(bars, K_FULL, k_place[0]), k_place[1])
        scores = _scores(q, buffers, k_place[0])
        mbarrier.wait(bar(bars, V_FULL, v_place[0]), v_place[1])
        if SPLIT:
            second_place = next_place(v_place, STAGES)
            mbarrier.wait(bar(bars, V_FULL, second_place[0]), second_place[1])
            v0 = first_block(buffers[2], v_place[0], VALUE, BLOCK, D, VALUES_LAYOUT)
            v1 = first_block(buffers[2], second_place[0], VALUE, BLOCK, D, VALUES_LAYOUT)
        else:
            v0, v1 = both_blocks(buffers[2], v_place[0], VALUE, BLOCK, D, VALUES_LAYOUT)
        product = _wide_product(p0, p1, accumulator, rescale, v0, v1, VALUE)
        scores = warpgroup_mma_wait(2, deps=[scores])
        mbarrier.arrive(bar(bars, K_EMPTY, k_place[0]), count=1)
        score, highest = _read_pools(scores, maximum, q_scale, scale, column_bias)
        accumulator, p0, p1 = warpgroup_mma_wait(0, deps=[product, p0, p1])
        mbarrier.arrive(bar(bars, V_EMPTY, v_place[0]), count=1)
        if SPLIT:
            mbarrier.arrive(bar(bars, V_EMPTY, second_place[0]), count=1)
            v_place = second_place
        rescale = gl.exp2(maximum - highest)
        maximum = highest
        k_place = next_place(k_place, STAGES)
        v_place = next_place(v_place, STAGES)
    return gl.convert_layout(accumulator, ACC, assert_trivial=True), total


@gluon.jit
def _of_head(OUT, of_tile, strides):
    """Where a head's output begins."""
    return OUT + of_tile[0].to(gl.int64) * strides[1] + of_tile[1].to(gl.int64) * strides[2]


@gluon.jit
def _consume(
    GROUP: gl.constexpr, Q, OUT, nonfinite, table, k_scales, v_scales, plan, buffers, bars, steps, main_steps, start,
    sizes, strides, scale_log2, of_tile, tail,
    V_TYPE: gl.constexpr, V_LAYOUT: gl.constexpr, D: gl.constexpr, LISTED: gl.constexpr, STAGES: gl.constexpr,
    P_LOG2: gl.constexpr, SCHEDULE: gl.constexpr,
    TAIL: gl.constexpr, POOL_TYPE: gl.constexpr, POOL_LAYOUT: gl.constexpr,
):  # fmt: skip
    """A warpgroup: gathers and quantises its 64 rows of Q, walks the list, scatters its rows of the output."""
    grid_tokens, grid_padded, prefix, length, grid_valid, context_valid = sizes
    stride_ql, stride_ol = strides[0], strides[3]
    LOADED: gl.constexpr = _row_major(D)
    LOADED_ROW: gl.constexpr = gl.SliceLayout(1, LOADED)
    ACC: gl.constexpr = _mma(D, V_TYPE.primitive_bitwidth)
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)

    positions = start + GROUP * ROWS + gl.arange(0, ROWS, LOADED_ROW)
    rows = _source_rows(table, positions, grid_tokens, grid_padded, prefix, length)
    channels = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, LOADED)), 0)
    offsets = gl.expand_dims(rows, 1).to(gl.int64) * stride_ql + channels
    x = gl.load(Q + offsets, mask=gl.expand_dims(rows, 1) + channels * 0 >= 0, other=0.0).to(gl.float32)
    largest = gl.maximum(gl.max(gl.abs(x), 1), 1e-12)
    quantized = (x * gl.expand_dims(127.0 / largest, 1) + MAGIC).to(gl.int32, bitcast=True).to(gl.int8)
    q_scale = gl.convert_layout(largest * (scale_log2 / 127.0), ROW)
    q = buffers[0].index(GROUP)
    q.store(quantized)
    fence_async_shared()

    accumulator = gl.zeros([ROWS, D], gl.float32, ACC)
    total = gl.zeros([ROWS], gl.float32, ROW)
    lowest = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    rescale = gl.full([ROWS], 1.0, gl.float32, ROW)
    first = block_at(plan, 0, LISTED)
    second = block_at(plan, 1, LISTED)
    scale0 = q_scale * gl.load(k_scales + first)
    scale1 = q_scale * gl.load(k_scales + second)
    mbarrier.wait(bar(bars, K_FULL, 0), 0)
    scores = warpgroup_mma_wait(0, deps=[_scores(q, buffers, 0)])
    mbarrier.arrive(bar(bars, K_EMPTY, 0), count=1)
    valid_of = (grid_valid, context_valid)
    raw0, raw1, maximum = _read(scores, lowest, 0, first, second, scale0, scale1, plan, valid_of, True)
    if SCHEDULE == AHEAD:
        buffers[3].index(GROUP).store(maximum)
    # Loop-carried values must not start as constants.
    v_place = (gl.to_tensor(0), gl.to_tensor(0))
    k_place = next_place(v_place, STAGES)
    # A step reads the scores of the next: the last full one belongs to the masked loop.
    unmasked = gl.maximum(main_steps - 1, 0)
    raw0, raw1, accumulator, total, maximum, rescale, scale0, scale1, k_place, v_place = _steps(
        raw0, raw1, accumulator, total, maximum, rescale, scale0, scale1, k_place, v_place, 0, unmasked,
        q, q_scale, k_scales, buffers, bars, plan, valid_of, V_TYPE, V_LAYOUT, D, LISTED, False, STAGES, P_LOG2, GROUP,
        SCHEDULE,
    )  # fmt: skip
    raw0, raw1, accumulator, total, maximum, rescale, scale0, scale1, k_place, v_place = _steps(
        raw0, raw1, accumulator, total, maximum, rescale, scale0, scale1, k_place, v_place, unmasked, steps,
        q, q_scale, k_scales, buffers, bars, plan, valid_of, V_TYPE, V_LAYOUT, D, LISTED, True, STAGES, P_LOG2, GROUP,
        SCHEDULE,
    )  # fmt: skip
    # Context rows have no tail.
    if TAIL and start < grid_padded:
        accumulator, total = _tail(
            accumulator, total, maximum, k_place, v_place, tail, of_tile, start, q, q_scale, buffers, bars,
            POOL_TYPE, POOL_LAYOUT, D, STAGES, V_TYPE.primitive_bitwidth == 8, P_LOG2,
        )  # fmt: skip

    if LISTED:
        OUT = _of_head(OUT, of_tile, strides)
    result = accumulator * gl.expand_dims(1.0 / total, 1)
    if v_scales is not None:
        result *= gl.expand_dims(gl.load(v_scales + of_tile[2] * D + gl.arange(0, D, gl.SliceLayout(0, ACC))), 0)
    result = gl.convert_layout(result.to(OUT.dtype.element_ty), LOADED)
    rows = _source_rows(table, positions, grid_tokens, grid_padded, prefix, length)
    target = OUT + gl.expand_dims(rows, 1).to(gl.int64) * stride_ol + channels
    gl.store(target, result, mask=gl.expand_dims(rows, 1) + channels * 0 >= 0)
    if nonfinite is not None:
        # Zero, or NaN where a channel is NaN or infinite.
        broken = gl.sum(result.to(gl.float32) * 0.0, 1) != 0.0
        gl.store(nonfinite + gl.zeros([ROWS], gl.int32, LOADED_ROW), 1, mask=broken)


@gluon.jit(
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
        "stretches",
    ]
)
def gluon_forward(
    Q, OUT, nonfinite, K, V, k_scales, v_scales, pooled_k, pooled_v, pool_scales, pool_bias, tail_bias,
    tables, order_of_head, kept_words, head_order, row_order, list_start, list_full, list_all, block_list,
    stride_qb, stride_qh, stride_ql, stride_ob, stride_oh, stride_ol,
    heads, group, grid_tokens, prefix, length, q_blocks, q_blocks_grid, k_blocks, k_blocks_grid, pools, stretches,
    scale_log2,
    D: gl.constexpr, P_LOG2: gl.constexpr, LISTED: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
    SCHEDULE: gl.constexpr,
):  # fmt: skip
    """One tile of 128 query rows of one (batch, head); grid (batch * heads * q_blocks,), four warps and eight more.

    K, V: tensor descriptors of the scratch as `[B*Hkv*k_blocks*64, D]` and `[B*Hkv*k_blocks*D, 64]`, a block each.
    pooled_k, pooled_v: likewise, `[B*Hq*stretches*pools rounded up to 64, D]`. The rest as in `triton_attention`.
    """
    program = gl.program_id(0)
    items = heads * q_blocks
    batch = program // items
    item = program % items
    head = item // q_blocks
    q_block = item % q_blocks
    if LISTED:
        head = gl.load(head_order + head)
        q_block = gl.load(row_order + head * q_blocks + q_block)
    kv_head = batch * (heads // group) + head // group
    order = gl.load(order_of_head + head // group)

    grid_valid = grid_tokens - (k_blocks_grid - 1) * BLOCK
    context_valid = length - grid_tokens - (k_blocks - k_blocks_grid - 1) * BLOCK
    ragged_grid = gl.where(grid_valid < BLOCK, 1, 0)
    if LISTED:
        row = head * (q_blocks_grid + 1) + gl.minimum(q_block, q_blocks_grid)
        blocks = block_list + gl.load(list_start + row)
        full = gl.load(list_full + row)
        count = gl.load(list_all + row)
    else:
        ragged_context = gl.where((k_blocks > k_blocks_grid) & (context_valid < BLOCK), 1, 0)
        blocks = order_of_head
        full = k_blocks - ragged_grid - ragged_context
        count = k_blocks
    plan = (blocks, full, count, k_blocks_grid - ragged_grid, ragged_grid, k_blocks_grid, k_blocks)
    main_steps = full // 2
    steps = main_steps + (count - 2 * main_steps + 1) // 2
    pool_steps = 0
    pool_base = 0
    tail = (k_scales, k_scales, k_scales, k_scales, 0, 0, 0, 0, 0)
    if TAIL:
        of_head = (pools + BLOCK - 1) // BLOCK
        pool_steps = gl.where(q_block < q_blocks_grid, (of_head + 1) // 2, 0)
        pool_base = _pool_set(batch, head, q_block, heads, stretches, q_blocks_grid) * of_head
        tail = (pool_scales, pool_bias, kept_words, tail_bias, pools, heads, stretches, q_blocks_grid, k_blocks_grid)

    queries = gl.allocate_shared_memory(gl.int8, [CONSUMERS, ROWS, D], K.layout)
    keys = gl.allocate_shared_memory(gl.int8, [STAGES, PAIR, D], K.layout)
    V_ROWS: gl.constexpr = V.block_type.shape[0]
    values = gl.allocate_shared_memory(V.dtype, [STAGES, 2 * V_ROWS, V.block_type.shape[1]], V.layout)
    marks = gl.allocate_shared_memory(gl.float32, [CONSUMERS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    buffers = (queries, keys, values, marks)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bars = (k_full, k_empty, v_full, v_empty)
    for i in gl.static_range(STAGES):
        mbarrier.init(bar(bars, K_FULL, i), count=1)
        mbarrier.init(bar(bars, K_EMPTY, i), count=CONSUMERS)
        mbarrier.init(bar(bars, V_FULL, i), count=1)
        mbarrier.init(bar(bars, V_EMPTY, i), count=CONSUMERS)

    Q += batch.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qh
    of_tile = (batch, head, kv_head)
    strides = (stride_ql, stride_ob, stride_oh, stride_ol)
    # Over a list registers are short in the loops: there it is worked out behind them. Dense it spills that way.
    if not LISTED:
        OUT = _of_head(OUT, of_tile, strides)
    table = tables + order.to(gl.int64) * grid_tokens
    sizes = (grid_tokens, q_blocks_grid * PAIR, prefix, length, grid_valid, context_valid)
    k_scales += kv_head * k_blocks
    start = q_block * PAIR
    V_TYPE: gl.constexpr = V.dtype
    V_LAYOUT: gl.constexpr = V.layout
    POOL_TYPE: gl.constexpr = pooled_v.dtype if TAIL else None
    POOL_LAYOUT: gl.constexpr = pooled_v.layout if TAIL else None
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), Q, OUT, nonfinite, table, k_scales, v_scales, plan, buffers, bars, steps, main_steps,
                start, sizes, strides, scale_log2, of_tile, tail, V_TYPE, V_LAYOUT, D, LISTED, STAGES, P_LOG2,
                SCHEDULE, TAIL, POOL_TYPE, POOL_LAYOUT,
            )),
            (_consume, (
                gl.constexpr(1), Q, OUT, nonfinite, table, k_scales, v_scales, plan, buffers, bars, steps, main_steps,
                start, sizes, strides, scale_log2, of_tile, tail, V_TYPE, V_LAYOUT, D, LISTED, STAGES, P_LOG2,
                SCHEDULE, TAIL, POOL_TYPE, POOL_LAYOUT,
            )),
            (produce, (
                K, V, pooled_k, pooled_v, plan, buffers, bars, steps, pool_steps, kv_head * k_blocks, pool_base,
                pools, LISTED, TAIL, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


settle(globals())
