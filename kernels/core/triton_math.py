"""Device functions that several kernels share. Import only where a launch is wanted: this module needs Triton."""

import triton
import triton.language as tl

from .settled import settle

# 1.5 * 2^23: adding it to a float of magnitude below 2^22 leaves the nearest integer in the low mantissa bits, so
# that int -> float is an integer add and float -> int a float add, both off the slow conversion unit.
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def source_rows(table, positions, grid_tokens, grid_padded, prefix, length):
    """Row of the original sequence at each padded position of a head's reordered sequence, int32; -1 where none.

    Positions 0..grid_padded hold the grid in the order `table` (int32 [grid_tokens]) and its padding; from
    grid_padded on come the prefix and then the suffix.
    """
    in_grid = positions < grid_tokens
    grid_row = tl.load(table + positions, mask=in_grid, other=0) + prefix
    context = positions - grid_padded
    context_row = tl.where(context < prefix, context, context + grid_tokens)
    in_context = (context >= 0) & (context_row < length)
    return tl.where(in_grid, grid_row, tl.where(in_context, context_row, -1))


@triton.jit
def halves(x):
    """The left and the right half of the columns of `[rows, n]`; of a product's result no register moves."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def round_to_int8(x):
    """Nearest integer, ties to even; |x| must stay below 127.5 (a value that reaches 128 would wrap)."""
    return (x + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def power_of_two_at_least(x):
    """Smallest power of two >= x for normal x > 0 (at most twice x): scaling by it is exact in any float format."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def packed(x):
    """4-bit values `[n, m]` of -7..7 two a byte, int8 `[n, m / 2]`: x[j] + 8 in the low bits, above it x[j + m/2]."""
    low, high = halves(x)
    return ((high << 4) | (low + 8)).to(tl.int8)


@triton.jit
def for_packed_keys(q):
    """What multiplies packed keys in place of 4-bit queries int8 `[n, D]`, and what is then taken from each row.

    A byte is x = 16 high + u with u = low + 8, and x & 15 is u. GPUs mask four bytes in one instruction but cannot
    shift them, so nothing is shifted:
        16 (q_low low + q_high high) = q_high x + (16 q_low - q_high) u - 128 sum(q_low)
    """
    low, high = halves(q)
    return ((low << 4) - high).to(tl.int8), high, 128 * tl.sum(low.to(tl.int32), 1)


@triton.jit
def quantized_queries(Q, rows, stride_l, stride_d, rotation, scale_log2, D, PADDED_D: tl.constexpr, QK, ROTATE):
    """This tile's rows of Q as integers (or scaled 16-bit floats) and the factor of each row, in log2 units."""
    channels = tl.arange(0, PADDED_D)
    offsets = rows[:, None].to(tl.int64) * stride_l + channels[None, :] * stride_d
    x = tl.load(Q + offsets, mask=(rows[:, None] >= 0) & (channels[None, :] < D), other=0.0)
    if ROTATE:
        matrix = tl.load(rotation + channels[:, None] * PADDED_D + channels[None, :])
        wide = tl.dot(x, matrix, input_precision="ieee")
    else:
        wide = x.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(wide), 1), 1e-12)
    if QK == "16":
        scale = power_of_two_at_least(largest)
        quantized = (wide / scale[:, None]).to(tl.bfloat16 if x.dtype == tl.bfloat16 else tl.float16)
        factor = scale * scale_log2
    else:
        LEVELS: tl.constexpr = 127.0 if QK == "int8" else 7.0
        quantized = round_to_int8(wide * (LEVELS / largest)[:, None])
        factor = largest * (scale_log2 / LEVELS)
    return quantized, factor


settle(globals())
