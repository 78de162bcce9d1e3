"""Attention of given queries in every block of keys, under several orders in one launch.

Import only where a launch is wanted: this module needs Triton. The meaning is in `reference`. Keys are taken
straight from the model's tensors (`triton_gather`): a copy of all keys in each order would cost more than what few rows
do with them. Each query meets each key once: the first kernel writes the logarithm of what a query gives a block, the
second knows all of them and so the query's whole sum. Nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.inputs import ScoreInputs
from ..core.layout import BLOCK_K, Geometry, padded_dim
from ..core.settled import settle
from ..core.support import capability_of
from ..core.triton_gather import LOG2E, bias_of, load_rows, tokens_of, valid_keys
from . import triton_statistics

# Logarithms that may be held at a time, in bytes; heads are done in groups that fit. Mean queries of 75,600 tokens and
# 40 heads take two launches so, 8.0 ms on an H200; in five it is 9.7 ms.
LOG_BYTES = 240 << 20
# Queries and blocks of keys of a step of the second kernel.
SUM_ROWS, SUM_BLOCKS = 64, 64


@triton.jit(do_not_specialize=[
    "first", "group", "rows", "tokens", "prefix", "context", "k_blocks", "blocks", "stride_bias", "batch",
    "stride_order", "stride_table",
])  # fmt: skip
def _query_logs(
    Q, K, key_bias, tables, logs,
    stride_qh, stride_ql, stride_qd, stride_kh, stride_kl, stride_kd, stride_bias, stride_order, stride_table,
    batch, first, group, rows, tokens, prefix, context, k_blocks, blocks, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS of the `rows` queries that a head has under one order, BLOCKS blocks of keys at a time, those of the context
    behind the grid's. Grid: (tiles, orders, heads): the programs of a head, which share its keys, are neighbours.

    logs float32 `[orders, heads, blocks, rows]`: log2 of the sum of 2^score over the keys of a block.
    """
    order, head = tl.program_id(1), first + tl.program_id(2)
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, BLOCKS * KEYS)
    part, columns = columns // KEYS, columns % KEYS
    Q += head.to(tl.int64) * stride_qh
    K += (head // group).to(tl.int64) * stride_kh
    tables += order.to(tl.int64) * stride_order + head.to(tl.int64) * stride_table
    real = within < rows
    q = load_rows(Q, order * rows + within, stride_ql, stride_qd, channels, real, D, PADDED_D)
    out = logs + (order.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * blocks * rows
    # Where the next keys are is known a step ahead: a load that feeds an address in its own step holds up the pipeline.
    token = tokens_of(tables, part, columns, tokens, prefix, context, k_blocks, KEYS)
    for start in range(0, blocks, BLOCKS):
        valid = valid_keys(start + part, columns, tokens, context, k_blocks, KEYS)
        k = load_rows(K, token, stride_kl, stride_kd, channels, valid, D, PADDED_D)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if BIASED:
            score += bias_of(key_bias, batch, stride_bias, token, valid)[None, :]
        score = tl.where(valid[None, :], score, float("-inf"))
        token = tokens_of(tables, start + BLOCKS + part, columns, tokens, prefix, context, k_blocks, KEYS)
        peak = tl.max(score, 1)
        total = tl.sum(tl.reshape(tl.exp2(score - peak[:, None]), [ROWS, BLOCKS, KEYS]), 2)
        at = start + tl.arange(0, BLOCKS)
        there = real[:, None] & (at < blocks)[None, :]
        tl.store(out + at.to(tl.int64)[None, :] * rows + within[:, None], peak[:, None] + tl.log2(total), there)


@triton.jit(do_not_specialize=["first", "heads", "rows", "each", "k_blocks", "blocks"])
def _query_sums(
    logs, mass, first, heads, rows, each, k_blocks, blocks, share,
    PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Sums over every PER_BLOCK queries of their shares of attention, from what `_query_logs` wrote, ROWS of a head's
    queries under one order, BLOCKS blocks of keys at a time. Grid: (tiles, orders, heads here).

    mass float32 `[orders, heads, each, k_blocks]`. ACCUMULATE: add to what earlier batch entries left.
    """
    GROUPS: tl.constexpr = ROWS // PER_BLOCK
    order, head = tl.program_id(1), first + tl.program_id(2)
    within, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCKS)
    real = (within < rows)[None, :]
    logs += (order.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * blocks * rows
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, blocks, BLOCKS):
        at = (start + columns)[:, None]
        log = tl.load(logs + at.to(tl.int64) * rows + within[None, :], real & (at < blocks), 0.0)
        log = tl.where(at < blocks, log, float("-inf"))
        highest = tl.maximum(peak, tl.max(log, 0))
        total = total * tl.exp2(peak - highest) + tl.sum(tl.exp2(log - highest[None, :]), 0)
        peak = highest
    whole = (peak + tl.log2(total))[None, :]
    block = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    out = mass + ((order.to(tl.int64) * heads + head) * each + block[None, :]) * k_blocks
    for start in range(0, k_blocks, BLOCKS):
        at = (start + columns)[:, None]
        log = tl.load(logs + at.to(tl.int64) * rows + within[None, :], real & (at < k_blocks), 0.0)
        weight = tl.where(real, tl.exp2(log - whole), 0.0)
        found = tl.sum(tl.reshape(weight, [BLOCKS, GROUPS, PER_BLOCK]), 2) * share
        there = (block < each)[None, :] & (at < k_blocks)
        if ACCUMULATE:
            found += tl.load(out + at, there, 0.0)
        tl.store(out + at, found, there)


def logs_tile(capability: tuple[int, int] | None, padded: int, wide: bool) -> triton_statistics.StatisticsTile:
    """The tile of `_query_logs`; arguments as `statistics_tile`'s. On data-centre GPUs a block of keys at a time with
    more of them under way is 8 % faster than two."""
    if capability is not None and capability[0] in (9, 10) and padded == 128 and not wide:
        return triton_statistics.StatisticsTile(128, BLOCK_K, 8, 4)
    return triton_statistics.statistics_tile(capability, padded, wide)


def launch_query_sums(scores: ScoreInputs, geometry: Geometry, tables: torch.Tensor, per_block: int) -> torch.Tensor:
    """The Triton counterpart of `reference.query_sums_reference`."""
    g, queries, k, key_bias = geometry, scores.q, scores.k, scores.key_bias
    batch, heads, count, dim = queries.shape
    orders, group = tables.shape[0], scores.group
    rows = count // orders
    each = rows // per_block
    padded = padded_dim(dim)
    tile = logs_tile(capability_of(queries.device), padded, queries.dtype == torch.float32)
    if tables.stride(2) != 1:
        tables = tables.contiguous()
    blocks = g.k_blocks + -(-g.context_tokens // g.block_k)
    step = triton_statistics.balanced(heads, LOG_BYTES // (4 * orders * rows * blocks))
    logs = torch.empty(orders * step * blocks * rows, device=queries.device)
    mass = torch.empty(orders, heads, each, g.k_blocks, device=queries.device)
    for b in range(batch):
        for first in range(0, heads, step):
            some = min(step, heads - first)
            _query_logs[(triton.cdiv(rows, tile.rows), orders, some)](
                queries[b], k[b], key_bias, tables, logs, *queries.stride()[1:], *k.stride()[1:],
                scores.bias_stride(), tables.stride(0), tables.stride(1),
                b, first, group, rows, g.grid_tokens, g.prefix, g.context_tokens, g.k_blocks, blocks,
                scores.score_scale * LOG2E,
                D=dim, PADDED_D=padded, ROWS=tile.rows, KEYS=g.block_k,
                BLOCKS=tile.keys // g.block_k, BIASED=key_bias is not None,
                PRECISION=triton_statistics.product_precision(k.dtype), num_warps=tile.warps, num_stages=tile.stages,
                enable_fp_fusion=True,
            )  # fmt: skip
            _query_sums[(triton.cdiv(rows, SUM_ROWS), orders, some)](
                logs, mass, first, heads, rows, each, g.k_blocks, blocks, 1 / batch,
                PER_BLOCK=per_block, ROWS=SUM_ROWS, BLOCKS=SUM_BLOCKS, ACCUMULATE=b > 0,
                num_warps=4, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
    return mass


settle(globals())
