"""The correction by mean queries on a GPU. The meaning is in `correction_reference`.

Import only where a launch is wanted: this module needs Triton. Keys and values are 16-bit numbers, taken straight from
the model's tensors; sums are float32. Keys are split over programs where there are few mean queries, and a second
kernel adds the parts up and the tail to them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .block_list import context_blocks
from .call import capability_of, padded_dim
from .configs import generation
from .correction_reference import query_groups
from .problem import SparsePattern
from .triton_rows import LOG2E, bias_of, load_rows, processors, tokens_of, valid_keys
from .triton_statistics import balanced

BLOCK = tl.constexpr(64)
# Programs per multiprocessor that the keys are split for, as far as each keeps at least so many blocks.
PROGRAMS = 2
LEAST_BLOCKS = 4
# Rows and pools of a step of the second kernel.
FINISH_ROWS = 32


@triton.jit(do_not_specialize=["group", "share", "grid_tokens", "prefix", "groups"])
def _mean_rows(
    X, tables, order_of_head, heads, out,
    stride_b, stride_h, stride_l, stride_d, group, share, grid_tokens, prefix, groups,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Means over each ROWS rows of the wanted heads, in 16 bits: out `[B, n, groups, PADDED_D]`. Grid: (groups, n, B).

    group: query heads per key head; share: how many query heads one head of X serves (1 for Q, `group` for K and V).
    """
    wanted = tl.program_id(1)
    head = tl.load(heads + wanted)
    order = tl.load(order_of_head + head // group).to(tl.int64)
    channels = tl.arange(0, PADDED_D)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = place < grid_tokens
    token = tl.load(tables + order * grid_tokens + place, real, 0) + prefix
    X += tl.program_id(2).to(tl.int64) * stride_b + (head // share).to(tl.int64) * stride_h
    x = load_rows(X, token, stride_l, stride_d, channels, real, D, PADDED_D)
    count = tl.minimum(grid_tokens - tl.program_id(0) * ROWS, ROWS).to(tl.float32)
    mean = tl.sum(x.to(tl.float32), 0) / count
    at = (tl.program_id(2) * tl.num_programs(1) + wanted).to(tl.int64) * groups + tl.program_id(0)
    tl.store(out + at * PADDED_D + channels, mean.to(out.dtype.element_ty))


@triton.jit
def _kept_words_of(words, block, k_blocks):
    """The half word of each row that has a key block's bit; blocks of the context have none."""
    return tl.load(words + tl.minimum(block, k_blocks - 1) // 32)


@triton.jit(
    do_not_specialize=[
        "group", "wanted_heads", "grid_tokens", "prefix", "context", "k_blocks", "blocks", "blocks_each", "groups",
    ]
)  # fmt: skip
def _query_sums(
    mean_q, K, V, tables, order_of_head, heads, kept_words, key_bias, peaks, totals, sums,
    stride_kb, stride_kh, stride_kl, stride_kd, stride_vb, stride_vh, stride_vl, stride_vd, stride_bias,
    group, wanted_heads, grid_tokens, prefix, context, k_blocks, blocks, blocks_each, groups, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """ROWS mean queries of one head over a part of its keys. Grid: (tiles, splits, B * n).

    mean_q `[B * n, groups, PADDED_D]`; kept_words in halves, int32: whole ones would take registers that the products
    need to run side by side. Weights are relative to the row's largest score in the part, stored in peaks
    `[B * n, splits, tiles * ROWS]` in log2 units; totals `[B * n, splits, 2, ...]`, sums
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
    kept_words += (head.to(tl.int64) * groups + own) * ((k_blocks + 63) // 64 + 1) * 2
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


@triton.jit(do_not_specialize=["wanted_heads", "grid_tokens", "k_blocks", "groups", "size", "splits"])
def _query_corrections(
    mean_q, mean_k, mean_v, tail_bias, heads, kept_words, peaks, totals, sums, out,
    wanted_heads, grid_tokens, k_blocks, groups, size, splits, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The corrections of ROWS mean queries from the parts of `_query_sums` and the pools. Grid: (tiles, B * n).

    mean_k and mean_v `[B * n, k_blocks, PADDED_D]`; out float32 `[B * n, groups, D]`.
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
    kept_words += (head.to(tl.int64) * groups + own) * ((k_blocks + 63) // 64 + 1)
    tail = tl.load(tail_bias + head) * 1.4426950408889634
    mean_k += entry * k_blocks * PADDED_D
    mean_v += entry * k_blocks * PADDED_D
    for start in range(0, k_blocks, BLOCK):
        pool = start + columns
        there = (pool < k_blocks)[:, None]
        k = tl.load(mean_k + pool[:, None] * PADDED_D + channels[None, :], there, 0.0)
        v = tl.load(mean_v + pool[:, None] * PADDED_D + channels[None, :], there, 0.0)
        counts = tl.maximum(tl.minimum(grid_tokens - pool * BLOCK, BLOCK), 1).to(tl.float32)
        score = tl.dot(q, tl.trans(k)) * scale_log2 + (tl.log2(counts) + tail)[None, :]
        kept = (tl.load(kept_words + start // 64)[:, None] >> columns[None, :]) & 1
        score = tl.where((kept != 0) | (pool >= k_blocks)[None, :], float("-inf"), score)
        highest = tl.maximum(peak, tl.max(score, 1))
        shrink = tl.exp2(peak - highest)
        weight = tl.exp2(score - highest[:, None]).to(v.dtype)
        kept_total = kept_total * shrink + tl.sum(weight.to(tl.float32), 1)
        kept_result = tl.dot(weight, v, kept_result * shrink[:, None])
        peak = highest
    delta = result - kept_result / kept_total[:, None]
    target = out + (entry * groups + row)[:, None] * D + channels[None, :]
    tl.store(target, delta, (row < groups)[:, None] & (channels < D)[None, :])


@triton.jit(do_not_specialize=["group", "grid_tokens", "prefix"])
def _add_corrections(
    out, corrections, shares, tables, order_of_head, heads, nonfinite,
    stride_b, stride_h, stride_l, stride_d, group, grid_tokens, prefix,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One group of ROWS rows of one head. Grid: (groups, n, B)."""
    wanted, batch = tl.program_id(1), tl.program_id(2)
    head = tl.load(heads + wanted)
    order = tl.load(order_of_head + head // group).to(tl.int64)
    channels = tl.arange(0, PADDED_D)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = place < grid_tokens
    token = tl.load(tables + order * grid_tokens + place, real, 0).to(tl.int64) + prefix
    at = ((batch * tl.num_programs(1) + wanted).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D
    delta = tl.load(corrections + at + channels, channels < D, 0.0) * tl.load(shares + head)
    out += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    target = out + token[:, None] * stride_l + channels[None, :] * stride_d
    mask = real[:, None] & (channels < D)[None, :]
    result = (tl.load(target, mask, 0.0).to(tl.float32) + delta[None, :]).to(out.dtype.element_ty)
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
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Triton counterpart of `correction_reference.query_corrections_reference`; the call has been checked."""
    g, (batch, q_heads, _, dim) = pattern.geometry, q.shape
    scale_log2 = (dim**-0.5 if scale is None else scale) * LOG2E
    device, padded, count, groups = q.device, padded_dim(dim), heads.numel(), query_groups(pattern)
    group = q_heads // k.shape[1]
    means = []
    for x, share, rows in ((q, 1, g.block_q), (k, group, g.block_k), (v, group, g.block_k)):
        blocks = -(-g.grid_tokens // rows)
        means.append(torch.empty(batch, count, blocks, padded, dtype=x.dtype, device=device))
        _mean_rows[(blocks, count, batch)](
            x, pattern.tables, pattern.order_of_head, heads, means[-1], *x.stride(), group, share, g.grid_tokens,
            g.prefix, blocks, D=dim, PADDED_D=padded, ROWS=rows, num_warps=4,
        )  # fmt: skip
    rows, warps, stages = correction_tile(capability_of(device), padded)
    tiles, entries = -(-groups // rows), batch * count
    blocks = g.k_blocks + context_blocks(g.context_tokens, g.block_k)
    splits = max(1, min(PROGRAMS * processors(device) // (tiles * entries), blocks // LEAST_BLOCKS))
    each = balanced(blocks, -(-blocks // splits))
    splits, size = -(-blocks // each), tiles * rows
    peaks = torch.empty(entries, splits, size, device=device)
    totals = torch.empty(entries, splits, 2, size, device=device)
    sums = torch.empty(entries, splits, 2, size, padded, device=device)
    kept_words = pattern.kept_words
    _query_sums[(tiles, splits, entries)](
        means[0], k, v, pattern.tables, pattern.order_of_head, heads, kept_words.view(torch.int32), key_bias,
        peaks, totals, sums,
        *k.stride(), *v.stride(), 0 if key_bias is None else key_bias.stride(0),
        group, count, g.grid_tokens, g.prefix, g.context_tokens, g.k_blocks, blocks, each, groups, scale_log2,
        D=dim, PADDED_D=padded, ROWS=rows, BIASED=key_bias is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    out = torch.empty(batch, count, groups, dim, device=device)
    _query_corrections[(-(-groups // FINISH_ROWS), entries)](
        *means, pattern.tail_bias, heads, kept_words, peaks, totals, sums, out, count, g.grid_tokens, g.k_blocks,
        groups, size, splits, scale_log2, D=dim, PADDED_D=padded, ROWS=FINISH_ROWS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def launch_add_corrections(
    out: torch.Tensor,
    corrections: torch.Tensor,
    shares: torch.Tensor,
    pattern: SparsePattern,
    heads: torch.Tensor,
    nonfinite: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Triton counterpart of `correction_reference.add_corrections_reference`."""
    g, dim = pattern.geometry, out.shape[3]
    _add_corrections[(corrections.shape[2], heads.numel(), out.shape[0])](
        out, corrections.contiguous(), shares, pattern.tables, pattern.order_of_head, heads, nonfinite, *out.stride(),
        out.shape[1] // pattern.kv_heads, g.grid_tokens, g.prefix, D=dim, PADDED_D=padded_dim(dim), ROWS=g.block_q,
        num_warps=4,
    )  # fmt: skip
    return out
