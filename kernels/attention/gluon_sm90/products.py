"""Q K^T and P V of one warpgroup: how scores and weights lie in registers, and how the products are issued."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from ...core.settled import settle
from ...core.triton_math import MAGIC as _MAGIC
from ...core.triton_math import MAGIC_BITS as _MAGIC_BITS
from .pipeline import BLOCK, PAIR, both_blocks

MAGIC = gl.constexpr(_MAGIC.value)
MAGIC_BITS = gl.constexpr(_MAGIC_BITS.value)
# Query rows of a warpgroup.
ROWS = gl.constexpr(64)


@gluon.constexpr_function
def mma_layout(columns, bits):
    """A warpgroup's layout of a product `[64, columns]` of operands of so many bits."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 256 // bits])


SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAIR.value, 32]))
HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK.value, 32]))


@gluon.jit
def halves(x):
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
def stored_weights(p, V_TYPE: gl.constexpr):
    """Weights `[rows, 64]` in V's type, 8-bit ones packed: the compiler takes single bytes apart."""
    if V_TYPE.primitive_bitwidth == 16:
        return p.to(V_TYPE)
    else:
        return _packed(p)


@gluon.jit
def _operand(stored, V_TYPE: gl.constexpr, OUT: gl.constexpr):
    """What `stored_weights` gave, as the left operand `[rows, 64]` of P V."""
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
def issue_scores(q, buffers, stage):
    """Issues Q K^T of 128 keys."""
    zero = gl.zeros([ROWS, PAIR], gl.int32, SCORES)
    return warpgroup_mma(q, buffers[1].index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def as_float(scores):
    """Integers below 2^22 as floats that are MAGIC too large."""
    return (scores + MAGIC_BITS).to(gl.float32, bitcast=True)


@gluon.jit
def issue_wide_product(p0, p1, accumulator, rescale, v0, v1, V_TYPE: gl.constexpr):
    """Issues P V of 128 16-bit values on top of the rescaled accumulator."""
    OUT: gl.constexpr = accumulator.type.layout
    product = accumulator * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, OUT)), 1)
    product = warpgroup_mma(_operand(p0, V_TYPE, OUT), v0, product, is_async=True)
    return warpgroup_mma(_operand(p1, V_TYPE, OUT), v1, product, is_async=True)


@gluon.jit
def issue_product(
    p0, p1, accumulator, rescale, values, stage, V_TYPE: gl.constexpr, V_LAYOUT: gl.constexpr, D: gl.constexpr
):
    """Issues P V of 128 keys: in 16 bits on top of the rescaled accumulator, in 8 bits apart from it (two levels)."""
    OUT: gl.constexpr = accumulator.type.layout
    if V_TYPE.primitive_bitwidth == 16:
        v0, v1 = both_blocks(values, stage, V_TYPE, BLOCK, D, V_LAYOUT)
        product = issue_wide_product(p0, p1, accumulator, rescale, v0, v1, V_TYPE)
    else:
        v0, v1 = both_blocks(values, stage, V_TYPE, D, BLOCK, V_LAYOUT)
        product = gl.zeros([ROWS, D], gl.float32, OUT)
        product = warpgroup_mma(_operand(p0, V_TYPE, OUT), v0.permute((1, 0)), product, use_acc=False, is_async=True)
        product = warpgroup_mma(_operand(p1, V_TYPE, OUT), v1.permute((1, 0)), product, is_async=True)
    return product


settle(globals())
