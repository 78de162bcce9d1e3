"""What dropped blocks cost on sampled rows: exact outputs of the rows, costs of every block, sums over dropped blocks.

Import only where a launch is wanted: this module needs Triton. The meaning is in `tail_reference`. Heads are done in
groups that fit GROUP_BYTES (at least one head, whatever it takes), with their keys and values copied in the head's
order; nothing waits for the device. Inputs are multiplied in 16 bits with float32 sums, float32 ones in scaled fp16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .problem import BLOCK_K, Geometry
from .reference import pool_counts
from .tail_reference import BlockCosts, RowMoments, context_index
from .triton_statistics import balanced, take_rows

# Scratch memory of one group of heads, in bytes.
GROUP_BYTES = 1 << 29
ROWS = 64
# Pipeline stages: more would not fit the 99 KiB of shared memory of the smaller GPUs at D = 128.
STAGES = 2
LOG2E = math.log2(math.e)
# Weights are multiplied by 2^15 before they are rounded: of 75,600 equal ones each would be subnormal in fp16.
SHIFT = tl.constexpr(15.0)
UNSHIFT = tl.constexpr(1.0 / 32768.0)


@triton.jit
def _scores(q, K, bias, keys, limit, channels, factor, PADDED_D: tl.constexpr, BIASED: tl.constexpr):
    """Logits of a tile in log2 units; -inf from key `limit` on."""
    k = tl.load(K + keys[:, None] * PADDED_D + channels[None, :], (keys < limit)[:, None], 0.0)
    score = tl.dot(q, tl.trans(k)) * factor
    if BIASED:
        score += tl.load(bias + keys, keys < limit, 0.0)[None, :]
    return tl.where((keys < limit)[None, :], score, float("-inf"))


@triton.jit(do_not_specialize=["rows", "length"])
def _row_outputs(
    Q, K, V, bias, factors, out, lse, rows, length,
    PADDED_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS rows over all keys: out float32 `[H, rows, PADDED_D]`, lse float32 `[H, rows]` in log2 units.

    Q `[H, rows, PADDED_D]`, K and V `[H, length, PADDED_D]`, bias float32 `[H, length]`. Grid: (rows / ROWS, H).
    """
    head = tl.program_id(1).to(tl.int64)
    row = head * rows + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, KEYS)
    K += head * length * PADDED_D
    V += head * length * PADDED_D
    if BIASED:
        bias += head * length
    q = tl.load(Q + row[:, None] * PADDED_D + channels[None, :])
    factor = tl.load(factors + tl.program_id(1))
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED_D], tl.float32)
    for start in range(0, length, KEYS):
        keys = start + columns
        score = _scores(q, K, bias, keys, length, channels, factor, PADDED_D, BIASED)
        v = tl.load(V + keys[:, None] * PADDED_D + channels[None, :], (keys < length)[:, None], 0.0)
        highest = tl.maximum(maximum, tl.max(score, 1))
        shrink = tl.exp2(maximum - highest)
        weight = tl.exp2(score - highest[:, None])
        # The sum is of what is multiplied, so that what all values have in common stays exact.
        rounded = weight.to(v.dtype)
        total = total * shrink + tl.sum(rounded.to(tl.float32), 1)
        result = tl.dot(rounded, v, result * shrink[:, None])
        maximum = highest
    tl.store(out + row[:, None] * PADDED_D + channels[None, :], result / total[:, None])
    tl.store(lse + row, maximum + tl.log2(total))


@triton.jit
def _per_query_block(x, GROUPS: tl.constexpr, PER_BLOCK: tl.constexpr):
    return tl.sum(tl.reshape(x, [GROUPS, PER_BLOCK]), 1)


@triton.jit(do_not_specialize=["rows", "length", "tokens", "q_blocks", "k_blocks", "pools"])
def _block_costs(
    Q, K, V, bias, factors, out_high, out_low, lse, pool_weights, pooled_values, costs,
    stride_table, rows, length, tokens, q_blocks, k_blocks, pools, share,
    PADDED_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PER_BLOCK: tl.constexpr, POOL: tl.constexpr,
    BIASED: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Costs of every key block for ROWS / PER_BLOCK query blocks. Grid: (rows / ROWS, H).

    out_high + out_low: the output of `_row_outputs` in two 16-bit parts; lse from there. pool_weights float32
    `[H, pools, rows]`, pooled_values float32 `[H, pools, PADDED_D]`.
    costs: five float32 tables `[H, q_blocks, k_blocks]`, stride_table apart.
    """
    GROUPS: tl.constexpr = ROWS // PER_BLOCK
    POOLS: tl.constexpr = KEYS // POOL
    head = tl.program_id(1).to(tl.int64)
    row = head * rows + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, KEYS)
    K += head * length * PADDED_D
    V += head * length * PADDED_D
    if BIASED:
        bias += head * length
    pool_weights += head * pools * rows
    pooled_values += head * pools * PADDED_D
    q = tl.load(Q + row[:, None] * PADDED_D + channels[None, :])
    o_high = tl.load(out_high + row[:, None] * PADDED_D + channels[None, :])
    o_low = tl.load(out_low + row[:, None] * PADDED_D + channels[None, :])
    o = o_high.to(tl.float32) + o_low.to(tl.float32)
    out_square = tl.sum(o * o, 1)
    row_lse = tl.load(lse + row) - SHIFT
    factor = tl.load(factors + tl.program_id(1))
    q_block = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    valid = q_block < q_blocks
    costs += (head * q_blocks + q_block) * k_blocks
    for block in range(0, k_blocks):
        keys = block * KEYS + columns
        score = _scores(q, K, bias, keys, tokens, channels, factor, PADDED_D, BIASED)
        v = tl.load(V + keys[:, None] * PADDED_D + channels[None, :], (keys < tokens)[:, None], 0.0)
        weight = tl.exp2(score - row_lse[:, None]).to(v.dtype)
        # Of the rounded weights, so that rounding does not disturb the difference.
        mass = tl.sum(weight.to(tl.float32), 1)
        # x = total - mass o and y = pooled_total - pooled o, multiplied out: with o in two 16-bit parts its products
        # with the values come from the tensor cores, and neither o nor x nor y need registers.
        by_key = tl.dot(o_low, tl.trans(v), tl.dot(o_high, tl.trans(v)))
        total_out = tl.sum(weight.to(tl.float32) * by_key, 1)
        pool = block * POOLS + tl.arange(0, POOLS)
        counts = tl.minimum(tl.maximum(tokens - pool * POOL, 1), POOL).to(tl.float32)
        by_pool = tl.sum(tl.reshape(by_key, [ROWS, POOLS, POOL]), 2) / counts[None, :]
        at_pool = pool_weights + pool[None, :] * rows + within[:, None]
        each = tl.load(at_pool, (pool < pools)[None, :], 0.0) / UNSHIFT
        pooled = tl.sum(each, 1)
        pooled_out = tl.sum(each * by_pool, 1)
        total = tl.dot(weight, v)
        total_total = tl.sum(total * total, 1)
        if POOLS == 1:
            value = tl.load(pooled_values + block * PADDED_D + channels)[None, :]
            total_pooled = tl.sum(total * value, 1) * pooled
            pooled_pooled = tl.sum(value * value, 1) * pooled * pooled
        else:
            pooled_total = tl.zeros([ROWS, PADDED_D], tl.float32)
            for part in tl.static_range(POOLS):
                one = block * POOLS + part
                pool_weight = tl.load(pool_weights + one * rows + within, one < pools, 0.0) / UNSHIFT
                value = tl.load(pooled_values + one * PADDED_D + channels, one < pools, 0.0)
                pooled_total += pool_weight[:, None] * value[None, :]
            total_pooled = tl.sum(total * pooled_total, 1)
            pooled_pooled = tl.sum(pooled_total * pooled_total, 1)
        moved_rows = total_total - 2 * mass * total_out + mass * mass * out_square
        cross_rows = total_pooled - pooled * total_out - mass * pooled_out + mass * pooled * out_square
        other_rows = pooled_pooled - 2 * pooled * pooled_out + pooled * pooled * out_square
        at = costs + block
        square: tl.constexpr = UNSHIFT * UNSHIFT
        moved = _per_query_block(moved_rows, GROUPS, PER_BLOCK) * (share * square)
        cross = _per_query_block(cross_rows, GROUPS, PER_BLOCK) * (share * square)
        other = _per_query_block(other_rows, GROUPS, PER_BLOCK) * (share * square)
        mass_sum = _per_query_block(mass, GROUPS, PER_BLOCK) * (share * UNSHIFT)
        pooled_mass = _per_query_block(pooled, GROUPS, PER_BLOCK) * (share * UNSHIFT)
        if ACCUMULATE:
            moved += tl.load(at, valid, 0.0)
            cross += tl.load(at + stride_table, valid, 0.0)
            other += tl.load(at + 2 * stride_table, valid, 0.0)
            mass_sum += tl.load(at + 3 * stride_table, valid, 0.0)
            pooled_mass += tl.load(at + 4 * stride_table, valid, 0.0)
        tl.store(at, moved, valid)
        tl.store(at + stride_table, cross, valid)
        tl.store(at + 2 * stride_table, other, valid)
        tl.store(at + 3 * stride_table, mass_sum, valid)
        tl.store(at + 4 * stride_table, pooled_mass, valid)


@triton.jit(do_not_specialize=["rows", "length", "tokens", "q_blocks", "k_blocks"])
def _dropped_sums(
    Q, K, V, bias, factors, lse, levels, q_block_of_row, sums, masses, rows, length, tokens, q_blocks, k_blocks,
    PADDED_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Weights times values over the blocks whose level is above the mask's number. Grid: (rows / ROWS, masks, H).

    levels uint8 `[H, q_blocks, k_blocks]`; sums float32 `[H, masks, rows, PADDED_D]`, masses `[H, masks, rows]`.
    """
    mask, masks = tl.program_id(1), tl.num_programs(1)
    head = tl.program_id(2).to(tl.int64)
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, KEYS)
    K += head * length * PADDED_D
    V += head * length * PADDED_D
    if BIASED:
        bias += head * length
    row = head * rows + within
    q = tl.load(Q + row[:, None] * PADDED_D + channels[None, :])
    row_lse = tl.load(lse + row) - SHIFT
    factor = tl.load(factors + tl.program_id(2))
    levels += (head * q_blocks + tl.load(q_block_of_row + within)) * k_blocks
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED_D], tl.float32)
    for block in range(0, k_blocks):
        keys = block * KEYS + columns
        score = _scores(q, K, bias, keys, tokens, channels, factor, PADDED_D, BIASED)
        v = tl.load(V + keys[:, None] * PADDED_D + channels[None, :], (keys < tokens)[:, None], 0.0)
        dropped = tl.load(levels + block).to(tl.int32) > mask
        weight = tl.where(dropped[:, None], tl.exp2(score - row_lse[:, None]), 0.0).to(v.dtype)
        total += tl.sum(weight.to(tl.float32), 1)
        result = tl.dot(weight, v, result)
    row = (head * masks + mask) * rows + within
    tl.store(sums + row[:, None] * PADDED_D + channels[None, :], result * UNSHIFT)
    tl.store(masses + row, total * UNSHIFT)


@dataclass(frozen=True)
class _Group:
    """Some heads of one batch entry, ready to be multiplied. h heads, R rows (padded to whole tiles), n key tokens.

    q `[h, R, D]`, k and v `[h, L, D]` 16-bit in the head's order, context last; bias float32 `[h, L]` or None; factors
    float32 `[h]`: from products to logits in log2 units. out float32 `[h, R, D]`, lse `[h, R]`: exact. pool_weights
    `[h, pools, R]`, pooled_values `[h, pools, D]`. unit float32 `[h]`: what values were divided by.
    """

    heads: slice
    batch: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    factors: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    pool_weights: torch.Tensor
    pooled_values: torch.Tensor
    unit: torch.Tensor


def _sixteen_bits(x: torch.Tensor, largest: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x `[h, n, D]` in 16 bits and, for float32, the power of two per head that it was divided by, `[h]`.

    largest `[h]`: the magnitude that must fit, where it is not that of x alone.
    """
    if x.dtype != torch.float32:
        return x, None
    largest = (x.abs().amax((1, 2)) if largest is None else largest).clamp_min(1e-20)
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return (x / unit[:, None, None]).half(), unit


def _groups(q, k, v, g: Geometry, tables, positions, pool: int, scale: float, key_bias) -> Iterator[_Group]:
    """Exact outputs of the rows at `positions [rows]`, in groups of heads that fit GROUP_BYTES."""
    batch, heads, _, dim = q.shape
    padded = max(32, triton.next_power_of_2(dim))
    group = heads // k.shape[1]
    positions = torch.nn.functional.pad(positions, (0, -positions.numel() % ROWS))
    rows, pools = positions.numel(), -(-g.grid_tokens // pool)
    context = context_index(g, q.device)
    log_counts = pool_counts(g.grid_tokens, pool, q.device).float().log2()
    # Keys and values, rows and their outputs (queries also in float32), weights of the pools.
    per_head = g.length * padded * 4 + rows * padded * 14 + rows * pools * 4
    step = balanced(heads, GROUP_BYTES // per_head)
    # Costs are summed over the batch in units of the values: one unit a head for all of it.
    largest = v.abs().amax((0, 2, 3)).repeat_interleave(group) if v.dtype == torch.float32 else None
    for first in range(0, heads, step):
        some = slice(first, min(first + step, heads))
        columns = tables[some].long() + g.prefix
        count = columns.shape[0]
        index = torch.cat([columns, context.expand(count, -1)], 1)
        for b in range(batch):
            queries, q_unit = _sixteen_bits(take_rows(q[b], some, 1, columns[:, positions]))
            keys, k_unit = _sixteen_bits(take_rows(k[b], some, group, index))
            values, v_unit = _sixteen_bits(
                take_rows(v[b], some, group, index), None if largest is None else largest[some]
            )
            factors = torch.full((count,), scale * LOG2E, device=q.device)
            if q_unit is not None:
                factors = factors * q_unit * k_unit
            bias = None
            if key_bias is not None:
                bias = (key_bias[b].float()[index] * LOG2E).clamp_min(-1e30)
            out = torch.empty(count, rows, padded, device=q.device)
            lse = torch.empty(count, rows, device=q.device)
            _row_outputs[(rows // ROWS, count)](
                queries, keys, values, bias, factors, out, lse, rows, g.length,
                PADDED_D=padded, ROWS=ROWS, KEYS=BLOCK_K, BIASED=bias is not None,
                num_warps=4, num_stages=STAGES,
            )  # fmt: skip
            pooled_keys = _pool_means(keys[:, : g.grid_tokens], pool)
            weights = torch.bmm(pooled_keys, queries.float().transpose(1, 2))
            weights.mul_(factors[:, None, None]).add_(log_counts[:, None]).sub_(lse[:, None]).exp2_()
            pooled_values = _pool_means(values[:, : g.grid_tokens], pool)
            unit = torch.ones_like(factors) if v_unit is None else v_unit
            yield _Group(some, b, queries, keys, values, bias, factors, out, lse, weights, pooled_values, unit)


def _pool_means(x: torch.Tensor, pool: int) -> torch.Tensor:
    """float32 means over `pool` rows of x `[h, n, D]`, the last over what is there; makes no float32 copy of x."""
    whole = x.shape[1] // pool * pool
    means = x[:, :whole].unflatten(1, (-1, pool)).mean(2, dtype=torch.float32)
    if whole == x.shape[1]:
        return means
    return torch.cat([means, x[:, whole:].mean(1, keepdim=True, dtype=torch.float32)], 1)


def launch_block_costs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    positions: torch.Tensor,
    *,
    pool: int,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
) -> BlockCosts:
    """The Triton counterpart of `tail_reference.block_costs_reference`; rows of a query block: 1, 2, 4 ... 64."""
    g, (batch, heads, _, dim) = geometry, q.shape
    per_block = positions.shape[1]
    if per_block & (per_block - 1) or per_block > ROWS:
        raise ValueError(f"rows: {per_block} of each query block, expected a power of two up to {ROWS}")
    scale = dim**-0.5 if scale is None else scale
    costs = torch.empty(5, heads, g.q_blocks, g.k_blocks, device=q.device)
    energy = torch.zeros(heads, device=q.device)
    real = positions.numel()
    for s in _groups(q, k, v, g, tables, positions.flatten(), pool, scale, key_bias):
        rows, padded = s.q.shape[1:]
        high = s.out.to(s.v.dtype)
        low = (s.out - high).to(s.v.dtype)
        _block_costs[(rows // ROWS, s.q.shape[0])](
            s.q, s.k, s.v, s.bias, s.factors, high, low, s.lse, s.pool_weights, s.pooled_values, costs[:, s.heads],
            costs.stride(0), rows, g.length, g.grid_tokens, g.q_blocks, g.k_blocks, s.pooled_values.shape[1], 1 / batch,
            PADDED_D=padded, ROWS=ROWS, KEYS=g.block_k, PER_BLOCK=per_block, POOL=pool,
            BIASED=s.bias is not None, ACCUMULATE=s.batch > 0,
            num_warps=4, num_stages=STAGES,
        )  # fmt: skip
        if s.batch == batch - 1 and q.dtype == torch.float32:
            costs[:3, s.heads] *= s.unit.square()[None, :, None, None]
        energy[s.heads] += s.out[:, :real].square().sum((1, 2)) * s.unit.square() / batch
    return BlockCosts(*costs, energy)


def launch_row_moments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    positions: torch.Tensor,
    levels: torch.Tensor,
    masks: int,
    *,
    pool: int,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
) -> RowMoments:
    """The Triton counterpart of `tail_reference.row_moments_reference`."""
    g, (batch, heads, _, dim) = geometry, q.shape
    scale = dim**-0.5 if scale is None else scale
    real = positions.numel()
    result = torch.empty(5, batch, heads, masks, real, device=q.device)
    q_block = torch.nn.functional.pad(positions // g.block_q, (0, -real % ROWS)).int()
    for s in _groups(q, k, v, g, tables, positions, pool, scale, key_bias):
        count, rows, padded = s.q.shape
        sums = torch.empty(count, masks, rows, padded, device=q.device)
        masses = torch.empty(count, masks, rows, device=q.device)
        its_levels = levels[s.heads].contiguous()
        _dropped_sums[(rows // ROWS, masks, count)](
            s.q, s.k, s.v, s.bias, s.factors, s.lse, its_levels, q_block, sums, masses,
            rows, g.length, g.grid_tokens, g.q_blocks, g.k_blocks,
            PADDED_D=padded, ROWS=ROWS, KEYS=g.block_k, BIASED=s.bias is not None,
            num_warps=4, num_stages=STAGES,
        )  # fmt: skip
        its_pools = its_levels[:, q_block.long()].transpose(1, 2).repeat_interleave(g.block_k // pool, 1)
        its_pools = its_pools[:, : s.pool_weights.shape[1]]
        for mask in range(masks):
            weights = s.pool_weights * (its_pools > mask)
            pooled = weights.sum(1)
            x = sums[:, mask] - masses[:, mask, :, None] * s.out
            y = torch.bmm(weights.transpose(1, 2), s.pooled_values) - pooled[:, :, None] * s.out
            square = s.unit.square()[:, None]
            moments = [(x * x).sum(2) * square, (x * y).sum(2) * square, (y * y).sum(2) * square]
            moments = torch.stack([*moments, masses[:, mask], pooled])
            result[:, s.batch, s.heads, mask] = moments[:, :, :real]
    return RowMoments(*result)
