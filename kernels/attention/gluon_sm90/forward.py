"""The attention kernel for sm_90 in Gluon: one warp loads, two warpgroups of 64 query rows compute.

Takes the same arguments and scratch memory as `triton_forward.attention_forward` and computes the same, but there
softmax and products wait for each other. Here one warpgroup can multiply while the other takes exponentials, and both
read the K and V that one warp brought into shared memory (`pipeline`). A warpgroup goes over the kept key blocks
(`key_steps`), then over the pools of the dropped ones (`tail`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from ...core.settled import settle
from .key_steps import AHEAD, key_steps, read_scores
from .pipeline import BLOCK, K_EMPTY, K_FULL, PAIR, V_EMPTY, V_FULL, bar, block_at, next_place, produce
from .products import MAGIC, ROWS, issue_scores, mma_layout
from .tail import add_tail, pool_set

CONSUMERS = gl.constexpr(2)


@gluon.constexpr_function
def _row_major(D):
    """A warpgroup's layout of `[64, D]` 16-bit rows in memory: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])


@gluon.jit
def _source_rows(table, positions, grid_tokens, grid_padded, prefix, length):
    """As `triton_math.source_rows`."""
    in_grid = positions < grid_tokens
    grid_row = gl.load(table + positions, mask=in_grid, other=0) + prefix
    context = positions - grid_padded
    context_row = gl.where(context < prefix, context, context + grid_tokens)
    in_context = (context >= 0) & (context_row < length)
    return gl.where(in_grid, grid_row, gl.where(in_context, context_row, -1))


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
    ACC: gl.constexpr = mma_layout(D, V_TYPE.primitive_bitwidth)
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
    scores = warpgroup_mma_wait(0, deps=[issue_scores(q, buffers, 0)])
    mbarrier.arrive(bar(bars, K_EMPTY, 0), count=1)
    valid_of = (grid_valid, context_valid)
    raw0, raw1, maximum = read_scores(scores, lowest, 0, first, second, scale0, scale1, plan, valid_of, True)
    if SCHEDULE == AHEAD:
        buffers[3].index(GROUP).store(maximum)
    # Loop-carried values must not start as constants.
    v_place = (gl.to_tensor(0), gl.to_tensor(0))
    k_place = next_place(v_place, STAGES)
    # A step reads the scores of the next: the last full one belongs to the masked loop.
    unmasked = gl.maximum(main_steps - 1, 0)
    raw0, raw1, accumulator, total, maximum, rescale, scale0, scale1, k_place, v_place = key_steps(
        raw0, raw1, accumulator, total, maximum, rescale, scale0, scale1, k_place, v_place, 0, unmasked,
        q, q_scale, k_scales, buffers, bars, plan, valid_of, V_TYPE, V_LAYOUT, D, LISTED, False, STAGES, P_LOG2, GROUP,
        SCHEDULE,
    )  # fmt: skip
    raw0, raw1, accumulator, total, maximum, rescale, scale0, scale1, k_place, v_place = key_steps(
        raw0, raw1, accumulator, total, maximum, rescale, scale0, scale1, k_place, v_place, unmasked, steps,
        q, q_scale, k_scales, buffers, bars, plan, valid_of, V_TYPE, V_LAYOUT, D, LISTED, True, STAGES, P_LOG2, GROUP,
        SCHEDULE,
    )  # fmt: skip
    # Context rows have no tail.
    if TAIL and start < grid_padded:
        accumulator, total = add_tail(
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
    pooled_k, pooled_v: likewise, `[B*Hq*stretches*pools rounded up to 64, D]`.
    Other arguments as in `triton_forward.attention_forward`.
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
        pool_base = pool_set(batch, head, q_block, heads, stretches, q_blocks_grid) * of_head
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
