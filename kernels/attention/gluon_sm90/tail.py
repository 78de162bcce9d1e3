"""The tail of one warpgroup: online softmax over the pooled keys that stand for dropped blocks."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from ...core.settled import settle
from .pipeline import BLOCK, K_EMPTY, K_FULL, PAIR, V_EMPTY, V_FULL, bar, both_blocks, first_block, next_place
from .products import (
    MAGIC,
    ROWS,
    SCORES,
    as_float,
    halves,
    issue_scores,
    issue_wide_product,
    mma_layout,
    stored_weights,
)

LOG2E = gl.constexpr(1.4426950408889634)
# One column a thread.
POOL = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def pool_set(batch, head, q_block, heads, stretches, q_blocks_grid):
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
        as_float(scores),
        gl.zeros([ROWS, PAIR], gl.float32, SCORES) + gl.expand_dims(scale, 0),
        gl.zeros([ROWS, PAIR], gl.float32, SCORES) - gl.expand_dims(scale * MAGIC, 0),
    )
    row_scale = gl.convert_layout(q_scale, gl.SliceLayout(1, SCORES))
    score = score * gl.expand_dims(row_scale, 1) + gl.expand_dims(bias, 0)
    return score, gl.maximum(maximum, gl.convert_layout(gl.max(score, 1), maximum.type.layout))


@gluon.jit
def add_tail(
    accumulator, total, maximum, k_place, v_place, tail, of_tile, start, q, q_scale, buffers, bars,
    VALUE: gl.constexpr, VALUES_LAYOUT: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    P_LOG2: gl.constexpr,
):  # fmt: skip
    """Online softmax over the pooled keys of dropped blocks, 128 a step; scheduled as `key_steps`, PLAIN.

    A column's scale, bit and bias are found by one thread, a step ahead, and handed round through shared memory: in the
    scores' own layout every thread would do it for 32 columns, for two rows each. P V is of 16 bits in every mode and
    so runs into the accumulator. SPLIT: 128 pooled values fill two places of the ring.
    What follows from the kernel's arguments is worked out here: registers are short in the loops before.
    """
    pool_scales, pool_bias, kept_words, tail_bias, pools, heads, stretches, q_blocks_grid, k_blocks_grid = tail
    batch, head, _ = of_tile
    blocks_of_pools = (pools + BLOCK - 1) // BLOCK
    pool_steps = (blocks_of_pools + 1) // 2
    first = pool_set(batch, head, start // PAIR, heads, stretches, q_blocks_grid) * blocks_of_pools * BLOCK
    pool_scales += first
    pool_bias += first
    kept_words += (head * q_blocks_grid + start // PAIR) * ((k_blocks_grid + 63) // 64 + 1)
    bias = gl.load(tail_bias + head) * LOG2E
    ROW: gl.constexpr = maximum.type.layout
    ACC: gl.constexpr = accumulator.type.layout
    accumulator = gl.convert_layout(accumulator, mma_layout(D, 16), assert_trivial=True)
    scale, column_bias = _of_pools(0, pool_scales, pool_bias, kept_words, bias, pools)
    mbarrier.wait(bar(bars, K_FULL, k_place[0]), k_place[1])
    scores = warpgroup_mma_wait(0, deps=[issue_scores(q, buffers, k_place[0])])
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
        p0, p1 = halves(p)
        p0 = stored_weights(p0, VALUE)
        p1 = stored_weights(p1, VALUE)
        mbarrier.wait(bar(bars, K_FULL, k_place[0]), k_place[1])
        scores = issue_scores(q, buffers, k_place[0])
        mbarrier.wait(bar(bars, V_FULL, v_place[0]), v_place[1])
        if SPLIT:
            second_place = next_place(v_place, STAGES)
            mbarrier.wait(bar(bars, V_FULL, second_place[0]), second_place[1])
            v0 = first_block(buffers[2], v_place[0], VALUE, BLOCK, D, VALUES_LAYOUT)
            v1 = first_block(buffers[2], second_place[0], VALUE, BLOCK, D, VALUES_LAYOUT)
        else:
            v0, v1 = both_blocks(buffers[2], v_place[0], VALUE, BLOCK, D, VALUES_LAYOUT)
        product = issue_wide_product(p0, p1, accumulator, rescale, v0, v1, VALUE)
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


settle(globals())
