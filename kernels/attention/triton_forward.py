"""The block-sparse attention kernel: INT8 (or 16-bit) Q K^T over a list of kept blocks, one of three P V products.

One program computes a tile of query rows of one head. It gathers and quantises its own rows of Q (each row is read
once, so a separate pass over Q would only move bytes), walks the head's kept key blocks, adds the pooled tail, and
scatters the result to the rows where the tokens came from. K and V come reordered from `triton_prepare`.
"""

import triton
import triton.language as tl

from ..core.settled import settle
from ..core.triton_math import MAGIC, for_packed_keys, quantized_queries, source_rows
from .triton_softmax_steps import BLOCK, one_block, pooled_tail, two_blocks


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
        "stretches",
    ]
)
def attention_forward(
    Q, OUT, nonfinite, q_scales, q_excess, K, V, k_scales, v_scales, key_bias,
    pooled_k, pooled_v, pooled_scales, pool_bias, tail_bias,
    tables, order_of_head, rotation, kept_words, head_order, row_order, list_start, list_full, list_all, block_list,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_ob, stride_oh, stride_ol,
    heads, group, grid_tokens, prefix, length, q_blocks, q_blocks_grid, k_blocks, k_blocks_grid, pools, stretches,
    scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, PAIRS: tl.constexpr,
    QK: tl.constexpr, PV: tl.constexpr, P_LOG2: tl.constexpr, LISTED: tl.constexpr, TAIL: tl.constexpr,
    POOL: tl.constexpr, BIASED: tl.constexpr, ROTATE: tl.constexpr, VALUES_SCALED: tl.constexpr,
    PACKED: tl.constexpr, SEPARATE_TAIL: tl.constexpr, HALVES: tl.constexpr,
    STAGES: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS query rows of one (batch, head). See `attention.launch.forward` for every argument.

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
    PER_ELEMENT: tl.constexpr = OUT.dtype.element_ty.primitive_bitwidth // q.dtype.primitive_bitwidth
    waiting = out_head.to(tl.pointer_type(q.dtype), bitcast=True)
    waiting += rows[:, None].to(tl.int64) * (stride_ol * PER_ELEMENT)
    real = rows[:, None] >= 0
    staged = ((batch * heads + head) * q_blocks + q_block).to(tl.int64) * BLOCK_Q + tile * ROWS + tl.arange(0, ROWS)
    tl.store(q_scales + staged, q_scale)
    if PACKED:
        # The upper half ends where the output's row may: what lies behind its D channels is zero.
        half = tl.arange(0, PADDED_D // 2)[None, :]
        upper = half + PADDED_D // 2
        q, q_high, excess = for_packed_keys(q)
        tl.store(q_excess + staged, excess)
        tl.store(waiting + half, q, real)
        tl.store(waiting + upper, q_high, real & (upper < D))
        tl.debug_barrier()
        q = tl.load(waiting + half, real, other=0)
        q_high = tl.load(waiting + upper, real & (upper < D), other=0)
    else:
        whole = tl.arange(0, PADDED_D)[None, :]
        tl.store(waiting + whole, q, real & (whole < D))
        tl.debug_barrier()
        q = tl.load(waiting + whole, real & (whole < D), other=0)
        q_high = q
    q_scale = tl.load(q_scales + staged)
    q_base = tl.full([ROWS], 0.0 if QK == "16" else MAGIC, tl.float32)
    if PACKED:
        q_base += tl.load(q_excess + staged).to(tl.float32)

    K += kv_head.to(tl.int64) * k_blocks * (BLOCK * PADDED_D // 2 if PACKED else BLOCK * PADDED_D)
    V += kv_head.to(tl.int64) * k_blocks * (BLOCK * PADDED_D)
    k_scales += kv_head * k_blocks
    key_bias += kv_head.to(tl.int64) * k_blocks * BLOCK
    columns = tl.arange(0, BLOCK)

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
            accumulator, total, maximum = two_blocks(
                accumulator, total, maximum, q, q_high, q_scale, q_base, first, second, K, k_scales, V, key_bias,
                columns, PADDED_D, QK, PV, P_LOG2, PACKED, BIASED,
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
            accumulator, total, maximum = one_block(
                accumulator, total, maximum, q, q_high, q_scale, q_base, block, BLOCK, K, k_scales, V, key_bias,
                columns, PADDED_D, QK, PV, P_LOG2, PACKED, BIASED, False, HALVES,
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
        accumulator, total, maximum = one_block(
            accumulator, total, maximum, q, q_high, q_scale, q_base, block, valid, K, k_scales, V, key_bias, columns,
            PADDED_D, QK, PV, P_LOG2, PACKED, BIASED, True, HALVES,
        )  # fmt: skip

    if TAIL:
        if q_block < q_blocks_grid:
            # Of this query head, around the mean query of the stretch that its query block lies in.
            pool_set = (batch * heads + head) * stretches + q_block * stretches // q_blocks_grid
            pool_block = pool_set.to(tl.int64) * ((pools + BLOCK - 1) // BLOCK)
            accumulator, total = pooled_tail(
                accumulator, total, maximum, q, q_high, q_scale, q_base,
                kept_words + (head * q_blocks_grid + q_block) * ((k_blocks_grid + 63) // 64 + 1),
                tail_bias + head,
                pooled_k + pool_block * (BLOCK * PADDED_D // 2 if PACKED else BLOCK * PADDED_D),
                pooled_scales + pool_block * BLOCK, pool_bias + pool_block * BLOCK,
                pooled_v + pool_block * (BLOCK * PADDED_D), pools, columns,
                PADDED_D, QK, P_LOG2, POOL, PACKED, SEPARATE_TAIL, HALVES, TAIL_STAGES,
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


settle(globals())
