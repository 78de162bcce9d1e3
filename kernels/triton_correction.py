"""The correction by mean queries on a GPU. The meaning is in `correction_reference`.

Import only where a launch is wanted: this module needs Triton. Keys and values are 16-bit numbers, taken straight from
the model's tensors; sums are float32. Keys are split over programs where there are few mean queries, and a second
kernel adds the parts up and the tail to them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .block_list import context_blocks
from .call import capability_of, padded_dim
from .configs import generation
from .correction_reference import query_groups
from .pools import stretches_of
from .problem import SparsePattern
from .settled import settle
from .triton_pools import launch_expanded_pools, launch_mean_queries
from .triton_rows import LOG2E, bias_of, load_rows, processors, tokens_of, valid_keys
from .triton_statistics import balanced

BLOCK = tl.constexpr(64)
# Programs per multiprocessor that the keys are split for, as far as each keeps at least so many blocks.
PROGRAMS = 2
LEAST_BLOCKS = 4
# Mean queries of a program of the second kernel, and rows of one that adds corrections.
FINISH_ROWS = 32
ADD_ROWS = 64
# Pools of a group of heads, in bytes: of 75,600 tokens around 16 mean queries, 13 heads of 128 channels.
GROUP_BYTES = 128 << 20


@triton.jit
def _kept_words_of(words, block, k_blocks):
    """The half word of each row that has a key block's bit; blocks of the context have none."""
    return tl.load(words + tl.minimum(block, k_blocks - 1) // 32)


@triton.jit(
    do_not_specialize=[
        "stride_bias", "group", "wanted_heads", "grid_tokens", "prefix", "context", "q_blocks", "k_blocks", "blocks",
        "blocks_each",
        "groups", "per_block",
    ]
)  # fmt: skip
def _query_sums(
    mean_q, K, V, tables, order_of_head, heads, kept_words, key_bias, peaks, totals, sums,
    stride_kb, stride_kh, stride_kl, stride_kd, stride_vb, stride_vh, stride_vl, stride_vd, stride_bias,
    group, wanted_heads, grid_tokens, prefix, context, q_blocks, k_blocks, blocks, blocks_each, groups, per_block,
    scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """ROWS mean queries of one head over a part of its keys. Grid: (tiles, splits, B * n).

    mean_q `[B * n, groups, PADDED_D]`, per_block of them for each query block; kept_words in halves, int32: whole ones
    would take registers that the products need to run side by side. Weights are relative to the row's largest score in
    the part, stored in peaks `[B * n, splits, tiles * ROWS]` in log2 units; totals `[B * n, splits, 2, ...]`, sums
    `[B * n, splits, 2, ..., PADDED_D]`: first of all keys, then of the kept ones.
    """
    entry = tl.program_id(2)
    batch, head = entry // wanted_heads, tl.load(heads + entry % wanted_heads)
    kv_head = (head // group).to(tl.int64)
    table = tables + tl.load(order_of_head + head // group).to(tl.int64) * grid_tokens
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, BLOCK)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.minimum(row, groups - 1)
    q = tl.load(mean_q + (entry.to(tl.int64) * groups + own)[:, None] * PADDED_D + channels[None, :])
    kept_words += (head.to(tl.int64) * q_blocks + own // per_block) * ((k_blocks + 63) // 64 + 1) * 2
    K += batch.to(tl.int64) * stride_kb + kv_head * stride_kh
    V += batch.to(tl.int64) * stride_vb + kv_head * stride_vh

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    kept_total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED_D], tl.float32)
    kept_result = tl.zeros([ROWS, PADDED_D], tl.float32)
    begin = tl.program_id(1) * blocks_each
    # Known a step ahead: a load that feeds an address in its own step would hold up the pipeline.
    token = tokens_of(table, begin, columns, grid_tokens, prefix, context, k_blocks, BLOCK)
    word = _kept_words_of(kept_words, begin, k_blocks)
    for block in range(begin, tl.minimum(begin + blocks_each, blocks)):
        valid = valid_keys(block, columns, grid_tokens, context, k_blocks, BLOCK)
        k = load_rows(K, token, stride_kl, stride_kd, channels, valid, D, PADDED_D)
        v = load_rows(V, token, stride_vl, stride_vd, channels, valid, D, PADDED_D)
        score = tl.dot(q, tl.trans(k)) * scale_log2
        if BIASED:
            score += bias_of(key_bias, batch, stride_bias, token, valid)[None, :]
        score = tl.where(valid[None, :], score, float("-inf"))
        # Blocks of the context, behind those of the grid, are always kept.
        is_kept = (((word >> (block % 32)) & 1) != 0) | (block >= k_blocks)
        token = tokens_of(table, block + 1, columns, grid_tokens, prefix, context, k_blocks, BLOCK)
        word = _kept_words_of(kept_words, block + 1, k_blocks)
        highest = tl.maximum(peak, tl.max(score, 1))
        shrink = tl.exp2(peak - highest)
        weight = tl.exp2(score - highest[:, None]).to(v.dtype)
        # The sum is of what is multiplied, so that what all values have in common stays exact.
        added = tl.sum(weight.to(tl.float32), 1)
        total = total * shrink + added
        kept_total = kept_total * shrink + tl.where(is_kept, added, 0.0)
        result = tl.dot(weight, v, result * shrink[:, None])
        weight = tl.where(is_kept[:, None], weight, tl.zeros_like(weight))
        kept_result = tl.dot(weight, v, kept_result * shrink[:, None])
        peak = highest
    size = tl.num_programs(0) * ROWS
    part = (entry * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    tl.store(peaks + part * size + row, peak)
    at = 2 * part * size + row
    tl.store(totals + at, total)
    tl.store(totals + at + size, kept_total)
    tl.store(sums + at[:, None] * PADDED_D + channels[None, :], result)
    tl.store(sums + (at + size)[:, None] * PADDED_D + channels[None, :], kept_result)


@triton.jit(do_not_specialize=[
    "wanted_heads", "q_blocks", "k_blocks", "stretches", "groups", "per_block", "size", "splits",
])  # fmt: skip
def _query_corrections(
    mean_q, pooled_k, pooled_v, pool_bias, tail_bias, heads, kept_words, peaks, totals, sums, out,
    wanted_heads, q_blocks, k_blocks, stretches, groups, per_block, size, splits, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The corrections of ROWS mean queries from the parts of `_query_sums` and the pools. Grid: (tiles, B * n).

    pooled_k and pooled_v `[B * n, stretches, k_blocks, PADDED_D]`, pool_bias float32 and in log2 units, of which a mean
    query looks at those of its stretch; out float32 `[B * n, groups, D]`.
    """
    entry = tl.program_id(1).to(tl.int64)
    head = tl.load(heads + entry % wanted_heads)
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, BLOCK)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.minimum(row, groups - 1)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for split in range(splits):
        peak = tl.maximum(peak, tl.load(peaks + (entry * splits + split) * size + row))
    total = tl.zeros([ROWS], tl.float32)
    kept_total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED_D], tl.float32)
    kept_result = tl.zeros([ROWS, PADDED_D], tl.float32)
    for split in range(splits):
        part = entry * splits + split
        share = tl.exp2(tl.load(peaks + part * size + row) - peak)
        at = 2 * part * size + row
        total += share * tl.load(totals + at)
        kept_total += share * tl.load(totals + at + size)
        cells = at[:, None] * PADDED_D + channels[None, :]
        result += share[:, None] * tl.load(sums + cells)
        kept_result += share[:, None] * tl.load(sums + cells + size * PADDED_D)
    result /= total[:, None]

    q = tl.load(mean_q + (entry * groups + own)[:, None] * PADDED_D + channels[None, :])
    block = own // per_block
    kept_words += (head.to(tl.int64) * q_blocks + block) * ((k_blocks + 63) // 64 + 1)
    tail = tl.load(tail_bias + head) * 1.4426950408889634
    stretch = block * stretches // q_blocks
    for s in range(tl.min(stretch), tl.max(stretch) + 1):
        base = (entry * stretches + s) * k_blocks
        for start in range(0, k_blocks, BLOCK):
            pool = start + columns
            there = pool < k_blocks
            cells = (base + pool)[:, None] * PADDED_D + channels[None, :]
            k = tl.load(pooled_k + cells, there[:, None], 0.0)
            v = tl.load(pooled_v + cells, there[:, None], 0.0)
            bias = tl.load(pool_bias + base + pool, there, 0.0) + tail
            score = tl.dot(q, tl.trans(k)) * scale_log2 + bias[None, :]
            kept = (tl.load(kept_words + start // 64)[:, None] >> columns[None, :]) & 1
            dropped = (kept == 0) & there[None, :] & (stretch == s)[:, None]
            score = tl.where(dropped, score, float("-inf"))
            highest = tl.maximum(peak, tl.max(score, 1))
            shrink = tl.exp2(peak - highest)
            weight = tl.exp2(score - highest[:, None]).to(v.dtype)
            kept_total = kept_total * shrink + tl.sum(weight.to(tl.float32), 1)
            kept_result = tl.dot(weight, v, kept_result * shrink[:, None])
            peak = highest
    delta = result - kept_result / kept_total[:, None]
    target = out + (entry * groups + row)[:, None] * D + channels[None, :]
    tl.store(target, delta, (row < groups)[:, None] & (channels < D)[None, :])


@triton.jit(do_not_specialize=["group", "grid_tokens", "prefix", "groups", "rows"])
def _add_corrections(
    out, corrections, shares, tables, order_of_head, heads, nonfinite,
    stride_b, stride_h, stride_l, stride_d, group, grid_tokens, prefix, groups, rows,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head, of which each `rows` share a correction. Grid: (tiles, n, B)."""
    wanted, batch = tl.program_id(1), tl.program_id(2)
    head = tl.load(heads + wanted)
    order = tl.load(order_of_head + head // group).to(tl.int64)
    channels = tl.arange(0, PADDED_D)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = place < grid_tokens
    token = tl.load(tables + order * grid_tokens + place, real, 0).to(tl.int64) + prefix
    mask = real[:, None] & (channels < D)[None, :]
    at = ((batch * tl.num_programs(1) + wanted).to(tl.int64) * groups + place // rows) * D
    delta = tl.load(corrections + at[:, None] + channels[None, :], mask, 0.0) * tl.load(shares + head)
    out += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    target = out + token[:, None] * stride_l + channels[None, :] * stride_d
    result = (tl.load(target, mask, 0.0).to(tl.float32) + delta).to(out.dtype.element_ty)
    tl.store(target, result, mask)
    if nonfinite is not None:
        broken = tl.sum(result.to(tl.float32) * 0.0, 1) != 0.0
        tl.store(nonfinite + tl.zeros([ROWS], tl.int32), 1, broken)


def correction_tile(capability: tuple[int, int] | None, padded: int) -> tuple[int, int, int]:
    """Mean queries, warps and pipeline stages of a program of `_query_sums`; None: an AMD GPU.

    At D = 128 two accumulators spill with 4 warps, and with 128 rows everywhere but on Hopper, where two warpgroups of
    64 rows need half the issue slots that one of 64 does; on sm_120 64 rows spill too. Two stages fit the 99 KiB of
    the smaller GPUs.
    """
    if capability is not None and generation(capability) == "hopper":
        return (128, 8, 3) if padded > 64 else (64, 4, 3)
    if capability is not None and capability[0] == 12 and padded > 64:
        return 32, 4, 2
    return 64, 8 if padded > 64 else 4, 2


def launch_query_corrections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: SparsePattern,
    heads: torch.Tensor,
    *,
    rows: int,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Triton counterpart of `correction_reference.query_corrections_reference`; the call has been checked."""
    g = pattern.geometry
    pools = q.shape[0] * stretches_of(g, pattern.expansions) * g.k_blocks
    most = GROUP_BYTES // (pools * (2 * padded_dim(q.shape[3]) * q.element_size() + 4))
    # Parts of `heads` begin at 16 bytes: Triton compiles a kernel anew for pointers that do not.
    step = balanced(heads.numel(), most // 4 * 4 or most)
    step = step if most < 4 else -(-step // 4) * 4
    found = [_corrections_of(q, k, v, pattern, some, rows, scale, key_bias) for some in heads.split(step)]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _corrections_of(q, k, v, pattern: SparsePattern, heads: torch.Tensor, rows: int, scale, key_bias) -> torch.Tensor:
    """Of heads whose pools fit at a time."""
    g, (batch, q_heads, _, dim) = pattern.geometry, q.shape
    scale = dim**-0.5 if scale is None else scale
    device, padded, count, groups = q.device, padded_dim(dim), heads.numel(), query_groups(pattern, rows)
    entries, stretches, group = batch * count, stretches_of(g, pattern.expansions), q_heads // k.shape[1]
    orders = {"table_group": group, "wanted": heads}

    def means_of(geometry, stretches):
        means = torch.empty(entries, stretches, padded, dtype=q.dtype, device=device)
        launch_mean_queries(q, geometry, pattern.tables, pattern.order_of_head, means, **orders)
        return means

    # As of stretches of one query block each, were it of so many rows.
    mean_q = means_of(replace(g, block_q=rows), groups)
    around = means_of(g, stretches) if pattern.expansions else None
    pools = [torch.empty(entries, stretches, g.k_blocks, padded, dtype=q.dtype, device=device) for _ in range(2)]
    pools.append(torch.empty(entries, stretches, g.k_blocks, device=device))
    launch_expanded_pools(
        around, k, v, g, pattern.tables, pattern.order_of_head, pattern.pool, *pools, scale=scale, q_heads=q_heads,
        key_bias=key_bias, **orders,
    )  # fmt: skip

    tile, warps, stages = correction_tile(capability_of(device), padded)
    tiles = -(-groups // tile)
    blocks = g.k_blocks + context_blocks(g.context_tokens, g.block_k)
    splits = max(1, min(PROGRAMS * processors(device) // (tiles * entries), blocks // LEAST_BLOCKS))
    each = balanced(blocks, -(-blocks // splits))
    splits, size = -(-blocks // each), tiles * tile
    peaks = torch.empty(entries, splits, size, device=device)
    totals = torch.empty(entries, splits, 2, size, device=device)
    sums = torch.empty(entries, splits, 2, size, padded, device=device)
    kept_words, per_block = pattern.kept_words, g.block_q // rows
    _query_sums[(tiles, splits, entries)](
        mean_q, k, v, pattern.tables, pattern.order_of_head, heads, kept_words.view(torch.int32), key_bias,
        peaks, totals, sums,
        *k.stride(), *v.stride(), 0 if key_bias is None else key_bias.stride(0),
        group, count, g.grid_tokens, g.prefix, g.context_tokens, g.q_blocks, g.k_blocks, blocks, each, groups,
        per_block, scale * LOG2E,
        D=dim, PADDED_D=padded, ROWS=tile, BIASED=key_bias is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    out = torch.empty(batch, count, groups, dim, device=device)
    _query_corrections[(-(-groups // FINISH_ROWS), entries)](
        mean_q, *pools, pattern.tail_bias, heads, kept_words, peaks, totals, sums, out, count, g.q_blocks, g.k_blocks,
        stretches, groups, per_block, size, splits, scale * LOG2E,
        D=dim, PADDED_D=padded, ROWS=FINISH_ROWS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def launch_add_corrections(
    out: torch.Tensor,
    corrections: torch.Tensor,
    shares: torch.Tensor,
    pattern: SparsePattern,
    heads: torch.Tensor,
    *,
    rows: int,
    nonfinite: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Triton counterpart of `correction_reference.add_corrections_reference`."""
    g, dim = pattern.geometry, out.shape[3]
    _add_corrections[(-(-g.grid_tokens // ADD_ROWS), heads.numel(), out.shape[0])](
        out, corrections.contiguous(), shares, pattern.tables, pattern.order_of_head, heads, nonfinite, *out.stride(),
        out.shape[1] // pattern.kv_heads, g.grid_tokens, g.prefix, corrections.shape[2], rows,
        D=dim, PADDED_D=padded_dim(dim), ROWS=ADD_ROWS, num_warps=4,
    )  # fmt: skip
    return out


settle(globals())
