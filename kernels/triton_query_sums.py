"""Attention of given queries in every block of keys, under several orders in one launch.

Import only where a launch is wanted: this module needs Triton. The meaning is in `statistics_reference`. Keys are taken
straight from the model's tensors (`triton_rows`): a copy of all keys in each order would cost more than what few rows
do with them. Nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import triton_statistics
from .problem import Geometry
from .settled import settle
from .triton_rows import LOG2E, load_rows


@triton.jit(do_not_specialize=["group", "rows", "tokens", "prefix", "heads", "blocks", "k_blocks"])
def _query_sums(
    Q, K, lse, tables, mass,
    stride_qh, stride_ql, stride_qd, stride_kh, stride_kl, stride_kd, stride_lse, stride_order, stride_table,
    group, rows, tokens, prefix, heads, blocks, k_blocks, scale_log2, share,
    D: tl.constexpr, PADDED_D: tl.constexpr, PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCKS: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS of the `rows` queries that a head has under one order, BLOCKS key blocks at a time. Grid: (tiles, orders,
    H): the programs of a head, which share its keys, are neighbours.

    lse float32, `rows` of each order, natural logarithms. mass float32 `[orders, H, blocks, k_blocks]`. ACCUMULATE: add
    to what earlier batch entries left.
    """
    GROUPS: tl.constexpr = ROWS // PER_BLOCK
    order, head = tl.program_id(1), tl.program_id(2)
    within = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels, columns = tl.arange(0, PADDED_D), tl.arange(0, BLOCKS * KEYS)
    Q += head.to(tl.int64) * stride_qh
    K += (head // group).to(tl.int64) * stride_kh
    tables += order.to(tl.int64) * stride_order + head.to(tl.int64) * stride_table
    real = within < rows
    q = load_rows(Q, order * rows + within, stride_ql, stride_qd, channels, real, D, PADDED_D)
    # Rows behind the last weigh nothing.
    row_lse = tl.load(lse + head.to(tl.int64) * stride_lse + order * rows + within, real, float("inf"))
    row_lse = row_lse * 1.4426950408889634
    block = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    out = ((order.to(tl.int64) * heads + head) * blocks + block) * k_blocks
    # Where the next keys are is known a step ahead: a load that feeds an address in its own step holds up the pipeline.
    token = tl.load(tables + columns, columns < tokens, 0) + prefix
    for start in range(0, k_blocks, BLOCKS):
        keys = start * KEYS + columns
        valid = keys < tokens
        k = load_rows(K, token, stride_kl, stride_kd, channels, valid, D, PADDED_D)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - row_lse[:, None]
        token = tl.load(tables + BLOCKS * KEYS + keys, keys + BLOCKS * KEYS < tokens, 0) + prefix
        weight = tl.where(valid[None, :], tl.exp2(score), 0.0)
        total = tl.sum(tl.reshape(weight, [ROWS, BLOCKS, KEYS]), 2)
        total = tl.sum(tl.reshape(total, [GROUPS, PER_BLOCK, BLOCKS]), 1) * share
        at = start + tl.arange(0, BLOCKS)
        there = (block < blocks)[:, None] & (at < k_blocks)[None, :]
        at = mass + out[:, None] + at[None, :]
        if ACCUMULATE:
            total += tl.load(at, there, 0.0)
        tl.store(at, total, there)


def launch_query_sums(
    queries: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    per_block: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """The Triton counterpart of `statistics_reference.query_sums_reference`."""
    g, (batch, heads, count, dim) = geometry, queries.shape
    orders = tables.shape[0]
    rows = count // orders
    tile = triton_statistics.tile_of(queries)
    if tables.stride(2) != 1:
        tables = tables.contiguous()
    lse = lse.contiguous()
    scale_log2 = (dim**-0.5 if scale is None else scale) * LOG2E
    mass = torch.empty(orders, heads, rows // per_block, g.k_blocks, device=queries.device)
    for b in range(batch):
        _query_sums[(triton.cdiv(rows, tile.rows), orders, heads)](
            queries[b], k[b], lse[b], tables, mass, *queries.stride()[1:], *k.stride()[1:], lse.stride(1),
            tables.stride(0), tables.stride(1), heads // k.shape[1], rows, g.grid_tokens, g.prefix, heads,
            rows // per_block, g.k_blocks, scale_log2, 1 / batch, D=dim, PADDED_D=triton_statistics._padded(dim),
            PER_BLOCK=per_block, ROWS=tile.rows, KEYS=g.block_k, BLOCKS=tile.keys // g.block_k, ACCUMULATE=b > 0,
            PRECISION=triton_statistics._precision(k.dtype), num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=True,
        )  # fmt: skip
    return mass


settle(globals())
