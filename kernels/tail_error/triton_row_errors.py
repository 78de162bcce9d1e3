"""What the blocks that a mask drops contribute to sampled rows: one pass over keys and values, a short one over pools.

Import only where a launch is wanted: this module needs Triton. The meaning is in `reference`. With S and D the
sums of weights times values over all keys and over the dropped ones, s and d the sums of the weights, a row's output is
o = S / s and the dropped blocks contribute D / s - d / s o: all of it comes from the same pass, before anything is
normalised. Keys are split over programs, since few rows alone would leave most of a GPU idle; a second kernel adds the
parts up and the pools to them. Nothing waits for the device. Inputs are multiplied in 16 bits with float32 sums,
float32 ones in scaled fp16; pools are of the inputs' type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..core.inputs import AttentionInputs
from ..core.layout import padded_dim
from ..core.settled import settle
from ..core.support import capability_of
from ..core.triton_gather import (
    LOG2E,
    SHIFT,
    UNSHIFT,
    bias_of,
    load_rows,
    processors,
    sixteen_bits,
    tokens_of,
    units_of,
    valid_keys,
)
from ..pooling.reference import stretches_of
from ..pooling.triton_pools import PoolBuffers, launch_expanded_pools
from ..statistics.triton_statistics import balanced
from .reference import RowMoments

# Sums of one group of entries, and pools of one part of it, in bytes: small beside what a model's layers hold. On an
# H100 the sums of a site of 75,600 tokens and 40 heads take three groups, its pools around 16 mean queries six parts:
# the sums want many entries at a time to fill the multiprocessors, and an entry's pools are four times as large.
SUM_BYTES = 32 << 20
POOL_BYTES = 64 << 20
# Programs per multiprocessor that the keys are split for, as far as each keeps at least so many blocks.
PROGRAMS = 4
LEAST_BLOCKS = 4


class PoolTile(NamedTuple):
    """Of the second kernel: rows of a program, pools of a step, warps."""

    rows: int
    pools: int
    warps: int


# Rows of a tile lie in several stretches, whose pools it goes over one after the other: the fewer rows the better.
POOL_TILE = PoolTile(16, 64, 4)
# Products of float32 inputs in three parts spill with fewer warps.
WIDE_POOL_TILE = PoolTile(32, 32, 8)


@dataclass(frozen=True)
class MomentsTile:
    """rows: of a program. warps, stages: Triton's launch options."""

    rows: int
    warps: int
    stages: int


def moments_tile(capability: tuple[int, int] | None, wide: bool, rows: int) -> MomentsTile:
    """The tile of `_row_sums` for so many rows: it holds two sums of `[tile rows, D]` in registers: eight warps, or it
    spills.

    Tall tiles read keys and values less often, but fit data-centre GPUs only, and would be half empty for few rows.
    None: an AMD GPU. wide: float32 inputs, which are converted on the way.
    """
    if capability is not None and capability[0] in (9, 10) and not wide and rows > 64:
        return MomentsTile(128, 8, 3)
    return MomentsTile(64, 8, 1 if wide else 2)


@triton.jit(do_not_specialize=[
    "stride_table", "stride_bias", "first", "heads", "group", "rows", "tokens", "prefix", "context", "q_blocks",
    "k_blocks", "blocks", "blocks_each",
    "splits", "entries",
])  # fmt: skip
def _row_sums(
    Q, K, V, key_bias, units, tables, positions, levels, peaks, totals, sums,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd, stride_bias, stride_table,
    first, heads, group, rows, tokens, prefix, context, q_blocks, k_blocks, blocks, blocks_each, splits, entries,
    scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BIASED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums over all and over dropped keys of ROWS rows, in one part of the blocks. Grid: (tiles, masks * splits, e).

    positions int64 `[rows]`; levels uint8 `[Hq, q_blocks, k_blocks]`: dropped above the mask's number. units as
    `units_of`, `entries` apart. Weights are relative to the row's largest score here, which is stored in peaks
    `[e, masks, splits, tiles * ROWS]` in log2 units, and 2^SHIFT times as large; totals `[e, masks, splits, 2, ...]`,
    sums `[e, masks, splits, 2, ..., PADDED_D]`: first of all, then of the dropped ones.
    """
    entry = first + tl.program_id(2)
    batch, head = entry // heads, entry % heads
    mask, split = tl.program_id(1) // splits, tl.program_id(1) % splits
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, KEYS)
    Q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    K += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    V += batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
    tables += head.to(tl.int64) * stride_table
    place = tl.load(positions + within, within < rows, 0)
    levels += (head.to(tl.int64) * q_blocks + place // BLOCK_Q) * k_blocks
    q = load_rows(Q, tl.load(tables + place) + prefix, stride_ql, stride_qd, channels, within < rows, D, PADDED_D)
    factor, q_unit, k_unit, v_unit = scale_log2, 1.0, 1.0, 1.0
    if WIDE:
        q_unit = tl.load(units + entry)
        k_unit = tl.load(units + entries + entry)
        v_unit = tl.load(units + 2 * entries + entry)
        factor = scale_log2 * q_unit * k_unit
    q = sixteen_bits(q, q_unit, WIDE)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    dropped_total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED_D], tl.float32)
    dropped = tl.zeros([ROWS, PADDED_D], tl.float32)
    begin = split * blocks_each
    # Where the next keys are is known a step ahead: a load that feeds an address in its own step holds up the pipeline.
    token = tokens_of(tables, begin, columns, tokens, prefix, context, k_blocks, KEYS)
    level = tl.load(levels + begin, begin < k_blocks, 0)
    for block in range(begin, tl.minimum(begin + blocks_each, blocks)):
        valid = valid_keys(block, columns, tokens, context, k_blocks, KEYS)
        k = sixteen_bits(load_rows(K, token, stride_kl, stride_kd, channels, valid, D, PADDED_D), k_unit, WIDE)
        v = sixteen_bits(load_rows(V, token, stride_vl, stride_vd, channels, valid, D, PADDED_D), v_unit, WIDE)
        score = tl.dot(q, tl.trans(k)) * factor
        if BIASED:
            score += bias_of(key_bias, batch, stride_bias, token, valid)[None, :]
        score = tl.where(valid[None, :], score, float("-inf"))
        is_dropped = level.to(tl.int32) > mask
        token = tokens_of(tables, block + 1, columns, tokens, prefix, context, k_blocks, KEYS)
        level = tl.load(levels + (block + 1), block + 1 < k_blocks, 0)
        highest = tl.maximum(peak, tl.max(score, 1))
        shrink = tl.exp2(peak - highest)
        weight = tl.exp2(score - (highest - SHIFT)[:, None]).to(v.dtype)
        # The sum is of what is multiplied, so that what all values have in common stays exact.
        added = tl.sum(weight.to(tl.float32), 1)
        total = total * shrink + added
        dropped_total = dropped_total * shrink + tl.where(is_dropped, added, 0.0)
        result = tl.dot(weight, v, result * shrink[:, None])
        weight = tl.where(is_dropped[:, None], weight, tl.zeros_like(weight))
        dropped = tl.dot(weight, v, dropped * shrink[:, None])
        peak = highest
    size = tl.num_programs(0) * ROWS
    part = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    tl.store(peaks + part * size + within, peak)
    at = 2 * part * size + within
    tl.store(totals + at, total)
    tl.store(totals + at + size, dropped_total)
    tl.store(sums + at[:, None] * PADDED_D + channels[None, :], result)
    tl.store(sums + (at + size)[:, None] * PADDED_D + channels[None, :], dropped)


@triton.jit(do_not_specialize=[
    "stride_table", "stride_result", "first", "heads", "rows", "size", "prefix", "q_blocks", "k_blocks", "pools",
    "stretches", "splits", "entries",
])  # fmt: skip
def _row_moments(
    Q, units, tables, positions, levels, pooled_k, pooled_v, pool_bias, peaks, totals, sums, result, exact,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_table, stride_result,
    first, heads, rows, size, prefix, q_blocks, k_blocks, pools, stretches, splits, entries, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, POOLS: tl.constexpr,
    PER_BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The moments of ROWS rows from the parts of `_row_sums`, of `size` rows each. Grid: (ceil(rows / ROWS), masks, e).

    pooled_k, pooled_v and pool_bias: of `launch_expanded_pools`, in the type of q; a row looks at those of its stretch.
    result: five tables float32 `[B * Hq, masks, rows]`, stride_result apart. exact float32 `[B * Hq, rows, D]`.
    """
    entry, mask, masks = first + tl.program_id(2), tl.program_id(1), tl.num_programs(1)
    batch, head = entry // heads, entry % heads
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = within < rows
    channels = tl.arange(0, PADDED_D)
    part = (tl.program_id(2) * masks + mask).to(tl.int64) * splits
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for split in range(splits):
        peak = tl.maximum(peak, tl.load(peaks + (part + split) * size + within, real, 0.0))
    total = tl.zeros([ROWS], tl.float32)
    dropped_total = tl.zeros([ROWS], tl.float32)
    for split in range(splits):
        share = tl.exp2(tl.load(peaks + (part + split) * size + within, real, 0.0) - peak)
        at = 2 * (part + split) * size + within
        total += share * tl.load(totals + at, real, 1.0)
        dropped_total += share * tl.load(totals + at + size, real, 0.0)
    lse = peak + tl.log2(total) - SHIFT

    Q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    place = tl.load(positions + within, real, 0)
    token = tl.load(tables + head.to(tl.int64) * stride_table + place) + prefix
    q = load_rows(Q, token, stride_ql, stride_qd, channels, real, D, PADDED_D)
    levels += (head.to(tl.int64) * q_blocks + place // BLOCK_Q) * k_blocks
    stretch = place.to(tl.int32) // BLOCK_Q * stretches // q_blocks
    pooled = tl.zeros([ROWS], tl.float32)
    tail = tl.zeros([ROWS, PADDED_D], tl.float32)
    # Rows that follow each other lie in few stretches, mostly in one.
    begin = tl.min(tl.where(real, stretch, stretches))
    end = tl.max(tl.where(real, stretch, 0)) + 1
    for s in range(begin, end):
        base = (tl.program_id(2) * stretches + s).to(tl.int64) * pools
        for start in range(0, pools, POOLS):
            pool = start + tl.arange(0, POOLS)
            at = pool[:, None] * PADDED_D + channels[None, :]
            keys = tl.load(pooled_k + base * PADDED_D + at, (pool < pools)[:, None], 0.0)
            bias = tl.load(pool_bias + base + pool, pool < pools, 0.0)
            score = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale_log2 + bias[None, :]
            level = tl.load(levels[:, None] + (pool // PER_BLOCK)[None, :], (pool < pools)[None, :], 0)
            wanted = (level.to(tl.int32) > mask) & (stretch == s)[:, None]
            # A pool weighs no more than its keys, so nothing overflows.
            weight = tl.where(wanted, tl.exp2(score - (lse - SHIFT)[:, None]), 0.0).to(q.dtype)
            pooled += tl.sum(weight.to(tl.float32), 1)
            values = tl.load(pooled_v + base * PADDED_D + at, (pool < pools)[:, None], 0.0)
            tail = tl.dot(weight, values, tail, input_precision="tf32x3")
    pooled *= UNSHIFT
    tail *= UNSHIFT

    out_sum = tl.zeros([ROWS, PADDED_D], tl.float32)
    dropped = tl.zeros([ROWS, PADDED_D], tl.float32)
    for split in range(splits):
        share = tl.exp2(tl.load(peaks + (part + split) * size + within, real, 0.0) - peak)[:, None]
        at = (2 * (part + split) * size + within)[:, None] * PADDED_D + channels[None, :]
        out_sum += share * tl.load(sums + at, real[:, None], 0.0)
        dropped += share * tl.load(sums + at + size * PADDED_D, real[:, None], 0.0)
    unit = 1.0
    if WIDE:
        unit = tl.load(units + 2 * entries + entry)
    mass = dropped_total / total
    x = (dropped - out_sum * mass[:, None]) * (unit / total)[:, None]
    y = tail - out_sum * (pooled * unit / total)[:, None]
    at = result + (entry.to(tl.int64) * masks + mask) * rows + within
    tl.store(at, tl.sum(x * x, 1), real)
    tl.store(at + stride_result, tl.sum(x * y, 1), real)
    tl.store(at + 2 * stride_result, tl.sum(y * y, 1), real)
    tl.store(at + 3 * stride_result, mass, real)
    tl.store(at + 4 * stride_result, pooled, real)
    if mask == 0:
        cells = (entry.to(tl.int64) * rows + within)[:, None] * D + channels[None, :]
        tl.store(exact + cells, out_sum * (unit / total)[:, None], real[:, None] & (channels < D)[None, :])


def blocks_of_a_part(blocks: int, programs: int, device: torch.device) -> int:
    """Key blocks that a program of `_row_sums` does of `blocks`, with so many programs where nothing is split."""
    splits = min(-(-PROGRAMS * processors(device) // programs), blocks // LEAST_BLOCKS)
    return balanced(blocks, -(-blocks // max(1, splits)))


@dataclass(frozen=True)
class _Split:
    """How a call is cut up.

    All rows take `tiles` tiles of `_row_sums`. The `blocks` key blocks, those of the context too, are cut into `splits`
    parts of at most `blocks_each`. Memory is for the sums of `entries` entries, and for the pools of `pool_entries`.
    """

    tile: MomentsTile
    tiles: int
    blocks: int
    blocks_each: int
    splits: int
    entries: int
    pool_entries: int


def _split(inputs: AttentionInputs, rows: int, masks: int, pools: int, stretches: int, tile: MomentsTile) -> _Split:
    g, q, padded, entries = inputs.geometry, inputs.q, padded_dim(inputs.dim), inputs.batch * inputs.heads
    tiles = -(-rows // tile.rows)
    blocks = g.k_blocks + -(-g.context_tokens // g.block_k)
    each = blocks_of_a_part(blocks, tiles * masks * entries, q.device)
    splits = -(-blocks // each)
    # Bytes of an entry: what `_row_sums` stores; mean queries, pooled keys, values and their bias.
    step = balanced(entries, SUM_BYTES // (4 * masks * splits * tiles * tile.rows * (2 * padded + 3)))
    part = balanced(step, POOL_BYTES // (stretches * (pools * (2 * padded * q.element_size() + 4) + 4 * padded)))
    return _Split(tile, tiles, blocks, each, splits, step, part)


def _pool_buffers(inputs: AttentionInputs, entries: int, stretches: int, pools: int, expanded: bool) -> PoolBuffers:
    """Keys and values in the type of q; mean queries, where wanted, in float32."""
    q, padded = inputs.q, padded_dim(inputs.dim)
    keys, values = (torch.empty(entries, stretches, pools, padded, dtype=q.dtype, device=q.device) for _ in range(2))
    bias = torch.empty(entries, stretches, pools, device=q.device)
    means = torch.empty(entries, stretches, padded, device=q.device) if expanded else None
    return PoolBuffers(keys, values, bias, means)


def launch_row_moments(
    inputs: AttentionInputs,
    positions: torch.Tensor,
    levels: torch.Tensor,
    masks: int,
    *,
    pool: int,
    expansions: int = 0,
    tile: MomentsTile | None = None,
) -> RowMoments:
    """The Triton counterpart of `reference.row_moments_reference`; tile: used in place of `moments_tile`'s."""
    inputs, levels = replace(inputs, tables=inputs.tables.contiguous()), levels.contiguous()
    q, k, v, g, tables = inputs.q, inputs.k, inputs.v, inputs.geometry, inputs.tables
    batch, heads, dim, padded = inputs.batch, inputs.heads, inputs.dim, padded_dim(inputs.dim)
    device, wide, entries, rows = q.device, q.dtype == torch.float32, batch * heads, positions.numel()
    pools, stretches = -(-g.grid_tokens // pool), stretches_of(g, expansions)
    split = _split(inputs, rows, masks, pools, stretches, tile or moments_tile(capability_of(device), wide, rows))
    tile, second, size = split.tile, WIDE_POOL_TILE if wide else POOL_TILE, split.tiles * split.tile.rows
    units, scale_log2 = units_of(q, k, v), inputs.score_scale * LOG2E
    result = torch.empty(5, batch, heads, masks, rows, device=device)
    exact = torch.empty(batch, heads, rows, dim, device=device)
    peaks = torch.empty(split.entries, masks, split.splits, size, device=device)
    totals = torch.empty(split.entries, masks, split.splits, 2, size, device=device)
    sums = torch.empty(split.entries, masks, split.splits, 2, size, padded, device=device)
    pooled = _pool_buffers(inputs, split.pool_entries, stretches, pools, expansions > 0)
    constants = {"D": dim, "PADDED_D": padded, "BLOCK_Q": g.block_q, "WIDE": wide}
    for first in range(0, entries, split.entries):
        last = min(first + split.entries, entries)
        _row_sums[(split.tiles, masks * split.splits, last - first)](
            q, k, v, inputs.key_bias, units, tables, positions, levels, peaks, totals, sums,
            *q.stride(), *k.stride(), *v.stride(), inputs.bias_stride(), tables.stride(0),
            first, heads, inputs.group, rows, g.grid_tokens, g.prefix, g.context_tokens, g.q_blocks, g.k_blocks,
            split.blocks, split.blocks_each, split.splits, entries, scale_log2,
            ROWS=tile.rows, KEYS=g.block_k, BIASED=inputs.key_bias is not None, **constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        for begin in range(first, last, split.pool_entries):
            count, behind = min(split.pool_entries, last - begin), slice(begin - first, None)
            launch_expanded_pools(inputs, pooled.of_first(count), pool, first=begin)
            _row_moments[(-(-rows // second.rows), masks, count)](
                q, units, tables, positions, levels, pooled.keys, pooled.values, pooled.bias, peaks[behind],
                totals[behind], sums[behind], result, exact, *q.stride(), tables.stride(0), result.stride(0),
                begin, heads, rows, size, g.prefix, g.q_blocks, g.k_blocks, pools, stretches, split.splits, entries,
                scale_log2, ROWS=second.rows, POOLS=second.pools, PER_BLOCK=g.block_k // pool, **constants,
                num_warps=second.warps, num_stages=2,
            )  # fmt: skip
    moved, cross, pooled_moved, mass, pooled_mass = result
    return RowMoments(moved, cross, pooled_moved, mass, pooled_mass, exact)


settle(globals())
