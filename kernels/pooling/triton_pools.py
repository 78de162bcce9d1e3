"""Mean queries and expanded pools on a GPU. The meaning is in `reference`.

Import only where a launch is wanted: this module needs Triton. Inputs are multiplied in their own type with float32
sums, float32 ones in three products of TF32 (exact ones are sums in registers, which spill); a mean query is rounded to
their type, which moves the point that the pools are expanded around, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..core.inputs import AttentionInputs
from ..core.layout import Geometry
from ..core.pattern import MOST_EXPANSIONS
from ..core.settled import settle
from ..core.triton_gather import LOG2E, bias_of, load_rows
from .reference import MEAN_ROWS

# Rows of the product with the keys: as few as the tensor cores take, and as many as there may be stretches.
SETS = tl.constexpr(MOST_EXPANSIONS)


@triton.jit(
    do_not_specialize=["stride_table", "first", "heads", "table_group", "tokens", "prefix", "q_blocks", "stretches"]
)
def _mean_queries(
    Q, tables, order_of_head, means, stride_qb, stride_qh, stride_ql, stride_qd, stride_table,
    first, heads, table_group, tokens, prefix, q_blocks, stretches,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """means `[entries, stretches, PADDED_D]`. Grid: (stretches, entries).

    order_of_head: which of the tables a head has, by head // table_group; None: the table of its own number.
    """
    entry = first + tl.program_id(1)
    batch, head = entry // heads, entry % heads
    order = head // table_group
    if order_of_head is not None:
        order = tl.load(order_of_head + order)
    stretch = tl.program_id(0)
    # As `reference.stretch_bounds`.
    start = (stretch * q_blocks + stretches - 1) // stretches * BLOCK_Q
    end = tl.minimum(((stretch + 1) * q_blocks + stretches - 1) // stretches * BLOCK_Q, tokens)
    count = tl.minimum(end - start, ROWS)
    row = tl.arange(0, ROWS)
    real = row < count
    place = start + (2 * row + 1) * (end - start) // (2 * count)
    token = tl.load(tables + order.to(tl.int64) * stride_table + place, real, 0) + prefix
    channels = tl.arange(0, PADDED_D)
    Q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q = load_rows(Q, token, stride_ql, stride_qd, channels, real, D, PADDED_D).to(tl.float32)
    mean = tl.sum(q, 0) / count
    at = (tl.program_id(1).to(tl.int64) * stretches + stretch) * PADDED_D + channels
    tl.store(means + at, mean.to(means.dtype.element_ty))


@triton.jit
def load_means(means, entry, stretches, channels, PADDED_D: tl.constexpr):
    """Mean queries of an entry, `[SETS, PADDED_D]`: zero behind the last, and all of them with plain means (None)."""
    stretch = tl.arange(0, SETS)
    if means is None:
        return tl.zeros([SETS, PADDED_D], tl.float32)
    else:
        at = (entry.to(tl.int64) * stretches + stretch)[:, None] * PADDED_D + channels[None, :]
        return tl.load(means + at, (stretch < stretches)[:, None], 0.0)


@triton.jit
def _weights_around(means, k, bias, inside, scale_log2, BIASED: tl.constexpr):
    """Weights of the keys in k's type `[SETS, keys]`, their sum and the logarithm to base 2 of their unit `[SETS]`."""
    score = tl.dot(means.to(k.dtype), tl.trans(k), input_precision="tf32x3") * scale_log2
    if BIASED:
        score += bias[None, :]
    score = tl.where(inside[None, :], score, float("-inf"))
    # A pool behind the last one has no keys: finite, for it is computed like any other.
    highest = tl.maximum(tl.max(score, 1), -2e30)
    # The sum is of what is multiplied, so that what all keys or values have in common stays exact.
    weight = tl.exp2(score - highest[:, None]).to(k.dtype)
    return weight, tl.maximum(tl.sum(weight.to(tl.float32), 1), 1e-30), highest


@triton.jit
def pools_around(means, k, v, bias, inside, scale_log2, BIASED: tl.constexpr):
    """One pool around each mean query: keys `[SETS, D]`, values `[SETS, D]`, logarithm to base 2 of their weight at it
    `[SETS]`, all float32.

    means `[SETS, D]`; k and v `[keys, D]`, rows in one order; bias float32 `[keys]` in log2 units; inside bool
    `[keys]`: which keys are in the pool. At the mean query m the pool weighs 2^weight, and so its bias is
    weight - scale_log2 m.key.
    """
    weight, total, highest = _weights_around(means, k, bias, inside, scale_log2, BIASED)
    keys = tl.dot(weight, k, input_precision="tf32x3") / total[:, None]
    values = tl.dot(weight.to(v.dtype), v, input_precision="tf32x3") / total[:, None]
    return keys, values, highest + tl.log2(total)


@triton.jit
def block_of_keys(
    K, V, key_bias, table, batch, stride_kl, stride_kd, stride_vl, stride_vd, stride_bias, tokens, prefix,
    D: tl.constexpr, PADDED_D: tl.constexpr, KEYS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Keys and values `[KEYS, PADDED_D]` of this program's block of a head's grid, their biases in log2 units (zero
    without) and which of them there are, `[KEYS]`. K and V begin at the head, the table at its order."""
    channels = tl.arange(0, PADDED_D)
    place = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    real = place < tokens
    token = tl.load(table + place, real, 0) + prefix
    k = load_rows(K, token, stride_kl, stride_kd, channels, real, D, PADDED_D)
    v = load_rows(V, token, stride_vl, stride_vd, channels, real, D, PADDED_D)
    bias = tl.zeros([KEYS], tl.float32)
    if BIASED:
        bias = bias_of(key_bias, batch, stride_bias, token, real)
    return k, v, bias, real


@triton.jit(do_not_specialize=[
    "stride_table", "stride_bias", "first", "heads", "group", "tokens", "prefix", "pools", "stretches",
])  # fmt: skip
def _expand(
    K, V, key_bias, tables, means, pooled_k, pooled_v, pool_bias, key_weights,
    stride_kb, stride_kh, stride_kl, stride_kd, stride_vb, stride_vh, stride_vl, stride_vd, stride_bias, stride_table,
    first, heads, group, tokens, prefix, pools, stretches, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, POOL: tl.constexpr, KEYS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Pools of one key block under every mean query of its head. Grid: (k_blocks, entries).

    pooled_k, pooled_v `[entries, stretches, pools, PADDED_D]`; pool_bias float32 `[entries, stretches, pools]` in log2
    units. key_weights float32 `[entries, tokens]`, or None: share of each key in its pool, in the head's order, of the
    first mean query.
    """
    entry = first + tl.program_id(1)
    batch, head = entry // heads, entry % heads
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, KEYS)
    K += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    V += batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
    k, v, bias, real = block_of_keys(
        K, V, key_bias, tables + head.to(tl.int64) * stride_table, batch,
        stride_kl, stride_kd, stride_vl, stride_vd, stride_bias, tokens, prefix, D, PADDED_D, KEYS, BIASED,
    )  # fmt: skip
    m = load_means(means, tl.program_id(1), stretches, channels, PADDED_D).to(k.dtype)
    stretch = tl.arange(0, SETS)
    for part in tl.static_range(KEYS // POOL):
        pool = tl.program_id(0) * (KEYS // POOL) + part
        keys, values, weight = pools_around(m, k, v, bias, real & (columns // POOL == part), scale_log2, BIASED)
        # Of the keys as they are stored, so that rounding them changes nothing at the mean query.
        keys = keys.to(pooled_k.dtype.element_ty)
        at_mean = tl.sum(m.to(tl.float32) * keys.to(tl.float32), 1) * scale_log2
        at = (tl.program_id(1).to(tl.int64) * stretches + stretch) * pools + pool
        wanted_rows = (stretch < stretches) & (pool < pools)
        tl.store(pool_bias + at, weight - at_mean, wanted_rows)
        cells = at[:, None] * PADDED_D + channels[None, :]
        tl.store(pooled_k + cells, keys, wanted_rows[:, None])
        tl.store(pooled_v + cells, values.to(pooled_v.dtype.element_ty), wanted_rows[:, None])
        if key_weights is not None:
            inside = real & (columns // POOL == part)
            weights, total, _ = _weights_around(m, k, bias, inside, scale_log2, BIASED)
            shares = tl.where((stretch == 0)[:, None], weights.to(tl.float32) / total[:, None], 0.0)
            at = tl.program_id(1).to(tl.int64) * tokens + tl.program_id(0) * KEYS + columns
            tl.store(key_weights + at, tl.sum(shares, 0), inside)


def expand_warps(dtype: torch.dtype, padded: int) -> int:
    """Warps of a program of `_expand`: float32 keys and values of 128 channels spill with four."""
    return 8 if dtype == torch.float32 and padded > 64 else 4


def launch_mean_queries(
    q: torch.Tensor, g: Geometry, tables: torch.Tensor, order_of_head: torch.Tensor | None, means: torch.Tensor, *,
    table_group: int = 1, first: int = 0,
) -> None:  # fmt: skip
    """Fill means `[entries, stretches, PADDED_D]`, in q's type or float32, for the entries from `first` on.

    q `[B, Hq, L, D]`. tables int `[n, N]`, one for each order (order_of_head int32 says which, by
    head // table_group) or, with order_of_head None, for each such number.
    """
    entries, stretches, padded = means.shape
    rows = min(MEAN_ROWS, triton.next_power_of_2(-(-g.q_blocks // stretches) * g.block_q))
    _mean_queries[(stretches, entries)](
        q, tables, order_of_head, means, *q.stride(), tables.stride(0),
        first, q.shape[1], table_group, g.grid_tokens, g.prefix, g.q_blocks, stretches,
        D=q.shape[3], PADDED_D=padded, BLOCK_Q=g.block_q, ROWS=rows, num_warps=4,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PoolBuffers:
    """Memory for the pools of several entries, filled by `launch_expanded_pools`.

    keys, values  `[entries, stretches, pools, PADDED_D]`, in the inputs' type or float32.
    bias          float32 `[entries, stretches, pools]`, in log2 units.
    means         `[entries, stretches, PADDED_D]`, likewise: mean queries; None: the pools are plain means, and there
                  is one stretch.
    key_weights   float32 `[entries, N]`: share of each key in its pool under the first mean query; None: not wanted.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    means: torch.Tensor | None = None
    key_weights: torch.Tensor | None = None

    def of_first(self, entries: int) -> PoolBuffers:
        """The memory of the first `entries` entries."""
        parts = (self.keys, self.values, self.bias, self.means, self.key_weights)
        return PoolBuffers(*(None if part is None else part[:entries] for part in parts))


def launch_expanded_pools(inputs: AttentionInputs, into: PoolBuffers, pool: int, *, first: int = 0) -> None:
    """Mean queries and the pools of `pool` keys around them, of as many entries from `first` on as `into` has."""
    g, k, v = inputs.geometry, inputs.k, inputs.v
    if into.means is not None:
        launch_mean_queries(inputs.q, g, inputs.tables, None, into.means, first=first)
    entries, stretches, pools, padded = into.keys.shape
    _expand[(g.k_blocks, entries)](
        k, v, inputs.key_bias, inputs.tables, into.means, into.keys, into.values, into.bias, into.key_weights,
        *k.stride(), *v.stride(), inputs.bias_stride(), inputs.tables.stride(0),
        first, inputs.heads, inputs.group, g.grid_tokens, g.prefix, pools, stretches, inputs.score_scale * LOG2E,
        D=inputs.dim, PADDED_D=padded, POOL=pool, KEYS=g.block_k, BIASED=inputs.key_bias is not None,
        num_warps=expand_warps(k.dtype, padded),
    )  # fmt: skip


settle(globals())
