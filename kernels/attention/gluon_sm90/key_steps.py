"""Online softmax over the kept key blocks, 128 keys a step, and the order in which a step's work is issued."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from ...core.settled import settle
from .pipeline import BLOCK, K_EMPTY, K_FULL, V_EMPTY, V_FULL, bar, block_at, next_place
from .products import HALF, MAGIC, as_float, halves, issue_product, issue_scores, stored_weights

# How a step is held in order; see `key_steps`.
PLAIN, MARKED, AHEAD = (gl.constexpr(i) for i in range(3))


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
def read_scores(scores, maximum, step, first, second, scale0, scale1, plan, valid_of, MASKED: gl.constexpr):
    """Scores of one step as floats in two halves, and the new row maximum. Masked: columns that hold no key."""
    raw0, raw1 = halves(as_float(scores))
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
def key_steps(
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
            scores = issue_scores(q, buffers, k_place[0])
            top = mark.load(ROW)
        p0 = _weights(raw0, scale0, top, P_LOG2)
        p1 = _weights(raw1, scale1, top, P_LOG2)
        total = total * rescale + gl.convert_layout(gl.sum(p0 + p1, 1), ROW)
        p0 = stored_weights(p0, V_TYPE)
        p1 = stored_weights(p1, V_TYPE)
        if SCHEDULE != AHEAD:
            mbarrier.wait(bar(bars, K_FULL, k_place[0]), k_place[1])
            scores = issue_scores(q, buffers, k_place[0])
        mbarrier.wait(bar(bars, V_FULL, v_place[0]), v_place[1])
        product = issue_product(p0, p1, accumulator, rescale, buffers[2], v_place[0], V_TYPE, V_LAYOUT, D)

        # Between products and wait: the latencies hide there, and few values are held while registers are short.
        first = block_at(plan, 2 * i + 2, LISTED, not MASKED)
        second = block_at(plan, 2 * i + 3, LISTED, not MASKED)
        next_scale0 = gl.load(k_scales + first)
        next_scale1 = gl.load(k_scales + second)
        scores = warpgroup_mma_wait(2, deps=[scores])
        scale0 = q_scale * next_scale0
        scale1 = q_scale * next_scale1
        raw0, raw1, highest = read_scores(scores, maximum, i + 1, first, second, scale0, scale1, plan, valid_of, MASKED)
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


settle(globals())
