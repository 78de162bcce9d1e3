"""The correction by mean queries on a GPU. The meaning is in `correction_reference`.

Import only where a launch is wanted: this module needs Triton. Keys and values are 16-bit numbers, read through the
head's order; sums are float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .block_list import block_list, context_blocks
from .call import capability_of, padded_dim
from .configs import generation
from .correction_reference import GROUP_ROWS, query_groups
from .problem import SparsePattern
from .triton_common import source_rows

# Pipeline stages: two fit the 99 KiB of shared memory of the smaller GPUs at D = 128.
STAGES = 2
BLOCK = tl.constexpr(64)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["group", "grid_tokens", "prefix", "rows"])
def _mean_rows(
    X, tables, order_of_head, heads, out,
    stride_b, stride_h, stride_l, stride_d, group, share, grid_tokens, prefix, rows,
    D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """Means over each 64 rows of the wanted heads, in 16 bits: out `[B, n, rows, PADDED_D]`. Grid: (blocks, n, B).

    group: query heads per key head; share: how many query heads one head of X serves (1 for Q, `group` for K and V).
    """
    wanted = tl.program_id(1)
    head = tl.load(heads + wanted)
    order = tl.load(order_of_head + head // group).to(tl.int64)
    channels = tl.arange(0, PADDED_D)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = position < grid_tokens
    row = tl.load(tables + order * grid_tokens + position, real, 0).to(tl.int64) + prefix
    X += tl.program_id(2).to(tl.int64) * stride_b + (head // share).to(tl.int64) * stride_h
    x = tl.load(
        X + row[:, None] * stride_l + channels[None, :] * stride_d, real[:, None] & (channels < D)[None, :], 0.0
    )
    count = tl.minimum(grid_tokens - tl.program_id(0) * BLOCK, BLOCK).to(tl.float32)
    mean = tl.sum(x.to(tl.float32), 0) / count
    at = (tl.program_id(2) * tl.num_programs(1) + wanted).to(tl.int64) * rows + tl.program_id(0)
    tl.store(out + at * PADDED_D + channels, mean.to(out.dtype.element_ty))


@triton.jit
def _row_sums(weight, values, total, result, shrink):
    """The online softmax's sums after one more block; total is of what is multiplied, the rounded weights."""
    return total * shrink + tl.sum(weight.to(tl.float32), 1), tl.dot(weight, values, result * shrink[:, None])


@triton.jit(
    do_not_specialize=["group", "q_blocks", "grid_tokens", "prefix", "length", "k_blocks", "blocks", "groups", "rows"]
)
def _corrections(
    mean_q, K, V, mean_k, mean_v, tail_bias, tables, order_of_head, heads, kept_words, key_bias, out,
    stride_kb, stride_kh, stride_kl, stride_kd, stride_vb, stride_vh, stride_vl, stride_vd, stride_bias,
    group, q_blocks, grid_tokens, prefix, length, k_blocks, blocks, groups, rows, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, GROUPS_PER_BLOCK: tl.constexpr, BIASED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS mean queries of one head over all its keys and pools. Grid: (rows / ROWS, n, B).

    mean_q, mean_k and mean_v `[B, n, rows, PADDED_D]`; out float32 `[B, n, groups, D]`.
    """
    wanted, batch = tl.program_id(1), tl.program_id(2)
    head = tl.load(heads + wanted)
    kv_head = (head // group).to(tl.int64)
    table = tables + tl.load(order_of_head + head // group).to(tl.int64) * grid_tokens
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, BLOCK)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = (batch * tl.num_programs(1) + wanted).to(tl.int64)
    q = tl.load(mean_q + (own * rows + row)[:, None] * PADDED_D + channels[None, :])
    words = (k_blocks + 63) // 64 + 1
    kept_words += (head * q_blocks + tl.minimum(row // GROUPS_PER_BLOCK, q_blocks - 1)).to(tl.int64) * words
    K += batch.to(tl.int64) * stride_kb + kv_head * stride_kh
    V += batch.to(tl.int64) * stride_vb + kv_head * stride_vh
    if BIASED:
        key_bias += batch.to(tl.int64) * stride_bias
    in_head = (channels < D)[None, :]

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    kept_total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, PADDED_D], tl.float32)
    kept_result = tl.zeros([ROWS, PADDED_D], tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        source = source_rows(table, block * BLOCK + columns, grid_tokens, k_blocks * BLOCK, prefix, length)
        real = source >= 0
        at = source[:, None].to(tl.int64)
        k = tl.load(K + at * stride_kl + channels[None, :] * stride_kd, real[:, None] & in_head, 0.0)
        v = tl.load(V + at * stride_vl + channels[None, :] * stride_vd, real[:, None] & in_head, 0.0)
        score = tl.dot(q, tl.trans(k)) * scale_log2
        if BIASED:
            bias = tl.load(key_bias + source, real, 0.0).to(tl.float32)
            score += tl.maximum(bias * LOG2E, -1e30)[None, :]
        score = tl.where(real[None, :], score, float("-inf"))
        highest = tl.maximum(maximum, tl.max(score, 1))
        shrink = tl.exp2(maximum - highest)
        weight = tl.exp2(score - highest[:, None]).to(v.dtype)
        # Blocks of the context, behind those of the grid, are always kept.
        word = tl.load(kept_words + tl.minimum(block, k_blocks - 1) // 64)
        kept = ((word >> (block % 64)) & 1) | tl.where(block >= k_blocks, 1, 0)
        kept_weight = tl.where(kept[:, None] != 0, weight, 0.0)
        total, result = _row_sums(weight, v, total, result, shrink)
        kept_total, kept_result = _row_sums(kept_weight, v, kept_total, kept_result, shrink)
        maximum = highest

    tail = tl.load(tail_bias + head) * LOG2E
    mean_k += own * rows * PADDED_D
    mean_v += own * rows * PADDED_D
    for start in tl.range(0, k_blocks, BLOCK, num_stages=STAGES):
        pool = start + columns
        there = (pool < k_blocks)[:, None]
        k = tl.load(mean_k + pool[:, None] * PADDED_D + channels[None, :], there, 0.0)
        v = tl.load(mean_v + pool[:, None] * PADDED_D + channels[None, :], there, 0.0)
        counts = tl.maximum(tl.minimum(grid_tokens - pool * BLOCK, BLOCK), 1).to(tl.float32)
        score = tl.dot(q, tl.trans(k)) * scale_log2 + (tl.log2(counts) + tail)[None, :]
        kept = (tl.load(kept_words + start // 64)[:, None] >> columns[None, :]) & 1
        score = tl.where((kept != 0) | (pool >= k_blocks)[None, :], float("-inf"), score)
        highest = tl.maximum(maximum, tl.max(score, 1))
        shrink = tl.exp2(maximum - highest)
        kept_total, kept_result = _row_sums(
            tl.exp2(score - highest[:, None]).to(v.dtype), v, kept_total, kept_result, shrink
        )
        total *= shrink
        result *= shrink[:, None]
        maximum = highest

    delta = result / total[:, None] - kept_result / kept_total[:, None]
    target = out + (own * groups + row)[:, None] * D + channels[None, :]
    tl.store(target, delta, (row < groups)[:, None] & in_head)


@triton.jit(do_not_specialize=["group", "grid_tokens", "prefix"])
def _add_corrections(
    out, corrections, shares, tables, order_of_head, heads, nonfinite,
    stride_b, stride_h, stride_l, stride_d, group, grid_tokens, prefix,
    D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """One group of 64 rows of one head. Grid: (groups, n, B)."""
    wanted, batch = tl.program_id(1), tl.program_id(2)
    head = tl.load(heads + wanted)
    order = tl.load(order_of_head + head // group).to(tl.int64)
    channels = tl.arange(0, PADDED_D)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = position < grid_tokens
    row = tl.load(tables + order * grid_tokens + position, real, 0).to(tl.int64) + prefix
    at = ((batch * tl.num_programs(1) + wanted).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * D
    delta = tl.load(corrections + at + channels, channels < D, 0.0) * tl.load(shares + head)
    out += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    target = out + row[:, None] * stride_l + channels[None, :] * stride_d
    mask = real[:, None] & (channels < D)[None, :]
    result = (tl.load(target, mask, 0.0).to(tl.float32) + delta[None, :]).to(out.dtype.element_ty)
    tl.store(target, result, mask)
    if nonfinite is not None:
        broken = tl.sum(result.to(tl.float32) * 0.0, 1) != 0.0
        tl.store(nonfinite + tl.zeros([BLOCK], tl.int32), 1, broken)


def correction_tile(capability: tuple[int, int] | None, padded: int) -> tuple[int, int]:
    """Mean queries and warps per program; None: an AMD GPU.

    At D = 128 two accumulators spill with 4 warps, and with 128 rows everywhere but on Hopper, where two warpgroups of
    64 rows need half the issue slots that one of 64 does.
    """
    hopper = capability is not None and generation(capability) == "hopper"
    return (128, 8) if hopper and padded > 64 else (64, 8 if padded > 64 else 4)


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
    scale = dim**-0.5 if scale is None else scale
    group, groups, padded = q_heads // k.shape[1], query_groups(pattern), padded_dim(dim)
    tile, warps = correction_tile(capability_of(q.device), padded)
    rows = -(-groups // tile) * tile
    means = torch.zeros(3, batch, heads.numel(), rows, padded, dtype=q.dtype, device=q.device)
    for x, mean, share in zip((q, k, v), means.unbind(), (1, group, group), strict=True):
        _mean_rows[(groups, heads.numel(), batch)](
            x, pattern.tables, pattern.order_of_head, heads, mean, *x.stride(), group, share, g.grid_tokens, g.prefix,
            rows, D=dim, PADDED_D=padded, num_warps=4,
        )  # fmt: skip
    out = torch.empty(batch, heads.numel(), groups, dim, device=q.device)
    blocks = g.k_blocks + context_blocks(g.context_tokens, g.block_k)
    _corrections[(rows // tile, heads.numel(), batch)](
        means[0], k, v, means[1], means[2], pattern.tail_bias, pattern.tables, pattern.order_of_head, heads,
        block_list(pattern).kept_words, key_bias, out, *k.stride(), *v.stride(),
        0 if key_bias is None else key_bias.stride(0), group, g.q_blocks, g.grid_tokens, g.prefix, g.length, g.k_blocks,
        blocks, groups, rows, scale * math.log2(math.e),
        D=dim, PADDED_D=padded, ROWS=tile, GROUPS_PER_BLOCK=g.block_q // GROUP_ROWS, BIASED=key_bias is not None,
        STAGES=STAGES, num_warps=warps, num_stages=STAGES,
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
        out.shape[1] // pattern.kv_heads, g.grid_tokens, g.prefix, D=dim, PADDED_D=padded_dim(dim), num_warps=4,
    )  # fmt: skip
    return out
