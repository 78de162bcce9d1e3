"""What dropped blocks cost on sampled rows: exact outputs of the rows, then the costs of every block.

Import only where a launch is wanted: this module needs Triton. The meaning is in `reference`. Rows, keys and
values are taken straight from the model's tensors (`triton_gather`); heads are done in groups whose outputs and pooled
values fit GROUP_BYTES (at least one head); nothing waits for the device. Inputs are multiplied in 16 bits with float32
sums, float32 ones in scaled fp16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from ..core.inputs import AttentionInputs
from ..core.layout import padded_dim
from ..core.settled import settle
from ..core.triton_gather import LOG2E, SHIFT, UNSHIFT, bias_of, load_rows, sixteen_bits, units_of
from ..pooling.triton_pools import PoolBuffers, launch_expanded_pools
from ..statistics.triton_statistics import balanced
from .reference import BlockCosts

# Outputs of sampled rows and pooled values of one group of heads, in bytes: of 75,600 tokens in query blocks of 128, of
# which 16 rows are looked at, ten heads of 128 channels, eleven programs for every multiprocessor of an H100.
GROUP_BYTES = 64 << 20
ROWS = 64
# Pipeline stages: more would not fit the 99 KiB of shared memory of the smaller GPUs at D = 128.
STAGES = 2


@triton.jit(
    do_not_specialize=[
        "stride_table",
        "stride_bias",
        "first",
        "heads",
        "group",
        "rows",
        "real_rows",
        "length",
        "prefix",
        "entries",
    ]
)
def _row_outputs(
    Q, K, V, key_bias, units, tables, positions, out_high, out_low, lse, energy,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_bias, stride_table,
    first, heads, group, rows, real_rows, length, prefix, entries, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BIASED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS rows over all keys, in the model's own order. Grid: (rows / ROWS, e).

    positions int64 `[real_rows]`: places in each head's order. out_high + out_low: the output in two 16-bit parts
    `[e, rows, PADDED_D]`, in units of the values; lse float32 `[e, rows]` in log2 units; energy float32 `[e, rows]`:
    squared output, zero in padding. units as `units_of`, `entries` apart.
    """
    entry = first + tl.program_id(1)
    batch, head = entry // heads, entry % heads
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, KEYS)
    Q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    K += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    V += batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
    real = within < real_rows
    place = tl.load(positions + within, real, 0)
    token = tl.load(tables + head.to(tl.int64) * stride_table + place) + prefix
    q = load_rows(Q, token, stride_ql, stride_qd, channels, real, D, PADDED_D)
    factor, q_unit, k_unit, v_unit = scale_log2, 1.0, 1.0, 1.0
    if WIDE:
        q_unit = tl.load(units + entry)
        k_unit = tl.load(units + entries + entry)
        v_unit = tl.load(units + 2 * entries + entry)
        factor = scale_log2 * q_unit * k_unit
    q = sixteen_bits(q, q_unit, WIDE)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED_D], tl.float32)
    for start in range(0, length, KEYS):
        keys = start + columns
        valid = keys < length
        k = load_rows(K, columns, stride_kl, stride_kd, channels, valid, D, PADDED_D)
        v = load_rows(V, columns, stride_vl, stride_vd, channels, valid, D, PADDED_D)
        k, v = sixteen_bits(k, k_unit, WIDE), sixteen_bits(v, v_unit, WIDE)
        score = tl.dot(q, tl.trans(k)) * factor
        if BIASED:
            score += bias_of(key_bias, batch, stride_bias, keys, valid)[None, :]
        score = tl.where(valid[None, :], score, float("-inf"))
        highest = tl.maximum(maximum, tl.max(score, 1))
        shrink = tl.exp2(maximum - highest)
        weight = tl.exp2(score - highest[:, None])
        # The sum is of what is multiplied, so that what all values have in common stays exact.
        rounded = weight.to(v.dtype)
        total = total * shrink + tl.sum(rounded.to(tl.float32), 1)
        result = tl.dot(rounded, v, result * shrink[:, None])
        maximum = highest
        K += KEYS * stride_kl
        V += KEYS * stride_vl
    result = result / total[:, None]
    high = result.to(out_high.dtype.element_ty)
    row = tl.program_id(1).to(tl.int64) * rows + within
    at = row[:, None] * PADDED_D + channels[None, :]
    tl.store(out_high + at, high)
    tl.store(out_low + at, (result - high.to(tl.float32)).to(out_low.dtype.element_ty))
    tl.store(lse + row, maximum + tl.log2(total))
    tl.store(energy + row, tl.where(real, tl.sum(result * result, 1) * v_unit * v_unit, 0.0))


@triton.jit
def _per_query_block(x, GROUPS: tl.constexpr, PER_BLOCK: tl.constexpr):
    return tl.sum(tl.reshape(x, [GROUPS, PER_BLOCK]), 1)


@triton.jit
def _pool_sums(x, ROWS: tl.constexpr, POOLS: tl.constexpr, POOL: tl.constexpr):
    """Sums of x `[ROWS, POOLS * POOL]` over each pool, `[ROWS, POOLS]`."""
    if POOLS == 1:  # A reshape would pass x through shared memory.
        return tl.sum(x, 1)[:, None]
    else:
        return tl.sum(tl.reshape(x, [ROWS, POOLS, POOL]), 2)


@triton.jit(do_not_specialize=[
    "stride_table", "stride_costs", "stride_bias", "first", "heads", "group", "rows", "real_rows", "tokens",
    "prefix", "q_blocks", "k_blocks", "pools", "entries",
])  # fmt: skip
def _block_costs(
    Q, K, V, key_bias, units, tables, positions, out_high, out_low, lse, pooled_values, pool_bias, key_weights, costs,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_bias, stride_table, stride_costs,
    first, heads, group, rows, real_rows, tokens, prefix, q_blocks, k_blocks, pools, entries, scale_log2, share,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PER_BLOCK: tl.constexpr,
    POOL: tl.constexpr, BIASED: tl.constexpr, WIDE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Costs of every key block for ROWS / PER_BLOCK query blocks. Grid: (rows / ROWS, e); arguments as `_row_outputs`.

    pooled_values, pool_bias and key_weights: of one mean query per head, see `triton_pools`. costs: five float32 tables
    `[Hq, q_blocks, k_blocks]`, stride_costs apart.
    """
    GROUPS: tl.constexpr = ROWS // PER_BLOCK
    POOLS: tl.constexpr = KEYS // POOL
    entry = first + tl.program_id(1)
    batch, head = entry // heads, entry % heads
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(1).to(tl.int64) * rows + within
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, KEYS)
    Q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    K += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    V += batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
    tables += head.to(tl.int64) * stride_table
    pooled_values += tl.program_id(1).to(tl.int64) * pools * PADDED_D
    pool_bias += tl.program_id(1) * pools
    key_weights += tl.program_id(1).to(tl.int64) * tokens
    real = within < real_rows
    token = tl.load(tables + tl.load(positions + within, real, 0)) + prefix
    q = load_rows(Q, token, stride_ql, stride_qd, channels, real, D, PADDED_D)
    factor, q_unit, k_unit, v_unit = scale_log2, 1.0, 1.0, 1.0
    if WIDE:
        q_unit = tl.load(units + entry)
        k_unit = tl.load(units + entries + entry)
        v_unit = tl.load(units + 2 * entries + entry)
        factor = scale_log2 * q_unit * k_unit
    q = sixteen_bits(q, q_unit, WIDE)
    o_high = tl.load(out_high + row[:, None] * PADDED_D + channels[None, :])
    o_low = tl.load(out_low + row[:, None] * PADDED_D + channels[None, :])
    o = o_high.to(tl.float32) + o_low.to(tl.float32)
    out_square = tl.sum(o * o, 1)
    row_lse = tl.load(lse + row) - SHIFT
    q_block = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    valid_rows = q_block < q_blocks
    costs += (head.to(tl.int64) * q_blocks + q_block) * k_blocks
    to_mass = share * UNSHIFT
    to_square = to_mass * UNSHIFT * v_unit * v_unit
    # Where the next keys are is known a step ahead: a load that feeds an address in its own step holds up the pipeline.
    token = tl.load(tables + columns, columns < tokens, 0) + prefix
    for block in range(0, k_blocks):
        keys = block * KEYS + columns
        valid = keys < tokens
        k = sixteen_bits(load_rows(K, token, stride_kl, stride_kd, channels, valid, D, PADDED_D), k_unit, WIDE)
        v = sixteen_bits(load_rows(V, token, stride_vl, stride_vd, channels, valid, D, PADDED_D), v_unit, WIDE)
        score = tl.dot(q, tl.trans(k)) * factor
        # A pooled key's product is the weighted mean of its keys' products.
        pool = block * POOLS + tl.arange(0, POOLS)
        share_of_pool = tl.load(key_weights + keys, valid, 0.0)
        its_bias = tl.load(pool_bias + pool, pool < pools, float("-inf"))
        pooled_score = _pool_sums(score * share_of_pool[None, :], ROWS, POOLS, POOL)
        each = tl.exp2(pooled_score + (its_bias[None, :] - row_lse[:, None]))
        if BIASED:
            score += bias_of(key_bias, batch, stride_bias, token, valid)[None, :]
        score = tl.where(valid[None, :], score, float("-inf"))
        token = tl.load(tables + KEYS + keys, keys + KEYS < tokens, 0) + prefix
        weight = tl.exp2(score - row_lse[:, None]).to(v.dtype)
        # Of the rounded weights, so that rounding does not disturb the difference.
        mass = tl.sum(weight.to(tl.float32), 1)
        # x = total - mass o and y = pooled_total - pooled o, multiplied out: with o in two 16-bit parts its products
        # with the values come from the tensor cores, and neither o nor x nor y need registers.
        by_key = tl.dot(o_low, tl.trans(v), tl.dot(o_high, tl.trans(v)))
        total_out = tl.sum(weight.to(tl.float32) * by_key, 1)
        # Loaded again rather than kept in registers.
        share_of_pool = tl.load(key_weights + keys, valid, 0.0, eviction_policy="evict_last")
        by_pool = _pool_sums(by_key * share_of_pool[None, :], ROWS, POOLS, POOL)
        pooled = tl.sum(each, 1)
        pooled_out = tl.sum(each * by_pool, 1)
        total = tl.dot(weight, v)
        total_total = tl.sum(total * total, 1)
        if POOLS == 1:
            value = (tl.load(pooled_values + block * PADDED_D + channels) / v_unit)[None, :]
            total_pooled = tl.sum(total * value, 1) * pooled
            pooled_pooled = tl.sum(value * value, 1) * pooled * pooled
        else:
            pooled_total = tl.zeros([ROWS, PADDED_D], tl.float32)
            for part in tl.static_range(POOLS):
                one = block * POOLS + part
                pool_weight = tl.sum(tl.where((tl.arange(0, POOLS) == part)[None, :], each, 0.0), 1)
                value = tl.load(pooled_values + one * PADDED_D + channels, one < pools, 0.0) / v_unit
                pooled_total += pool_weight[:, None] * value[None, :]
            total_pooled = tl.sum(total * pooled_total, 1)
            pooled_pooled = tl.sum(pooled_total * pooled_total, 1)
        moved_rows = total_total - 2 * mass * total_out + mass * mass * out_square
        cross_rows = total_pooled - pooled * total_out - mass * pooled_out + mass * pooled * out_square
        other_rows = pooled_pooled - 2 * pooled * pooled_out + pooled * pooled * out_square
        at = costs + block
        moved = _per_query_block(moved_rows, GROUPS, PER_BLOCK) * to_square
        cross = _per_query_block(cross_rows, GROUPS, PER_BLOCK) * to_square
        other = _per_query_block(other_rows, GROUPS, PER_BLOCK) * to_square
        mass_sum = _per_query_block(mass, GROUPS, PER_BLOCK) * to_mass
        pooled_mass = _per_query_block(pooled, GROUPS, PER_BLOCK) * to_mass
        if ACCUMULATE:
            moved += tl.load(at, valid_rows, 0.0)
            cross += tl.load(at + stride_costs, valid_rows, 0.0)
            other += tl.load(at + 2 * stride_costs, valid_rows, 0.0)
            mass_sum += tl.load(at + 3 * stride_costs, valid_rows, 0.0)
            pooled_mass += tl.load(at + 4 * stride_costs, valid_rows, 0.0)
        tl.store(at, moved, valid_rows)
        tl.store(at + stride_costs, cross, valid_rows)
        tl.store(at + 2 * stride_costs, other, valid_rows)
        tl.store(at + 3 * stride_costs, mass_sum, valid_rows)
        tl.store(at + 4 * stride_costs, pooled_mass, valid_rows)


@dataclass(frozen=True, eq=False)
class _Memory:
    """What the kernels hand on to each other for a group of heads of one batch entry, `heads` of them.

    out_high, out_low, lse, energy: as `_row_outputs` writes them. pools: plain, or around one mean query per head.
    """

    heads: int
    out_high: torch.Tensor
    out_low: torch.Tensor
    lse: torch.Tensor
    energy: torch.Tensor
    pools: PoolBuffers


def _memory(inputs: AttentionInputs, rows: int, pool: int, expanded: bool) -> _Memory:
    """For as many heads at a time as GROUP_BYTES hold, at least one; rows: sampled ones of a head, in whole tiles."""
    g, device, padded = inputs.geometry, inputs.q.device, padded_dim(inputs.dim)
    pools = -(-g.grid_tokens // pool)
    # Two 16-bit parts of the outputs, two numbers a row, pooled keys and values, a number a pool and a key.
    bytes_per_head = 4 * (rows * (padded + 2) + pools * (2 * padded + 1) + g.grid_tokens)
    heads = balanced(inputs.heads, GROUP_BYTES // bytes_per_head)
    kind = torch.float16 if inputs.q.dtype == torch.float32 else inputs.q.dtype
    high, low = (torch.empty(heads, rows, padded, dtype=kind, device=device) for _ in range(2))
    lse, energy = (torch.empty(heads, rows, device=device) for _ in range(2))
    means = torch.empty(heads, 1, padded, dtype=inputs.q.dtype, device=device) if expanded else None
    pooled_keys, pooled_values = (torch.empty(heads, 1, pools, padded, device=device) for _ in range(2))
    pool_bias = torch.empty(heads, 1, pools, device=device)
    key_weights = torch.empty(heads, g.grid_tokens, device=device)
    buffers = PoolBuffers(pooled_keys, pooled_values, pool_bias, means, key_weights)
    return _Memory(heads, high, low, lse, energy, buffers)


def launch_block_costs(
    inputs: AttentionInputs, positions: torch.Tensor, *, pool: int, expanded: bool = False
) -> BlockCosts:
    """The Triton counterpart of `reference.block_costs_reference`; rows of a query block: 1, 2, 4 ... 64."""
    per_block = positions.shape[1]
    if per_block & (per_block - 1) or per_block > ROWS:
        raise ValueError(f"rows: {per_block} of each query block, expected a power of two up to {ROWS}")
    inputs = replace(inputs, tables=inputs.tables.contiguous())
    q, k, v, key_bias, g = inputs.q, inputs.k, inputs.v, inputs.key_bias, inputs.geometry
    batch, heads, tables, positions = inputs.batch, inputs.heads, inputs.tables, positions.flatten()
    wide, units, scale_log2 = q.dtype == torch.float32, units_of(q, k, v), inputs.score_scale * LOG2E
    tiles = -(-positions.numel() // ROWS)
    memory = _memory(inputs, tiles * ROWS, pool, expanded)
    high, low, lse, pools = memory.out_high, memory.out_low, memory.lse, memory.pools
    costs = torch.empty(5, heads, g.q_blocks, g.k_blocks, device=q.device)
    energy = torch.zeros(heads, device=q.device)
    strides = (*q.stride(), *k.stride(), *v.stride(), inputs.bias_stride(), tables.stride(0))
    options = {
        "D": inputs.dim, "PADDED_D": high.shape[2], "ROWS": ROWS, "KEYS": g.block_k, "BIASED": key_bias is not None,
        "WIDE": wide, "num_warps": 4, "num_stages": 1 if wide else STAGES,
    }  # fmt: skip
    for start in range(0, heads, memory.heads):
        count = min(memory.heads, heads - start)
        for b in range(batch):
            first = b * heads + start
            which = (first, heads, inputs.group, tiles * ROWS, positions.numel())
            _row_outputs[(tiles, count)](
                q, k, v, key_bias, units, tables, positions, high, low, lse, memory.energy, *strides,
                *which, g.length, g.prefix, batch * heads, scale_log2, **options,
            )  # fmt: skip
            launch_expanded_pools(inputs, pools.of_first(count), pool, first=first)
            _block_costs[(tiles, count)](
                q, k, v, key_bias, units, tables, positions, high, low, lse, pools.values, pools.bias,
                pools.key_weights, costs, *strides, costs.stride(0), *which, g.grid_tokens, g.prefix, g.q_blocks,
                g.k_blocks, pools.keys.shape[2], batch * heads, scale_log2, 1 / batch,
                PER_BLOCK=per_block, POOL=pool, ACCUMULATE=b > 0, **options,
            )  # fmt: skip
            energy[start : start + count] += memory.energy[:count].sum(1) / batch
    moved, cross, pooled_moved, mass, pooled = costs
    return BlockCosts(moved, cross, pooled_moved, mass, pooled, energy)


settle(globals())
