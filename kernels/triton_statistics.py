"""Calibration statistics, streamed: row log-sum-exp, then block sums, maxima and small-value counts under an order.

Import only where a launch is wanted: this module needs Triton. The meaning is in `statistics_reference`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .problem import BLOCK_K, Geometry
from .reference import pool_rows
from .statistics_reference import BlockStatistics

# Bytes of reordered queries and keys at a time; heads are done in groups that fit.
REORDER_BYTES = 1 << 28
ROWS = 64


@triton.jit(do_not_specialize=["length"])
def _row_logsumexp(
    Q, K, key_bias, lse,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd, stride_bias,
    heads, group, length, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head; lse float32 `[B, H, L]`. Grid: (ceil(L / ROWS), H, B)."""
    head, batch = tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, PADDED_D)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    Q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    K += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    in_head = channels[None, :] < D
    q = tl.load(
        Q + rows[:, None].to(tl.int64) * stride_ql + channels[None, :] * stride_qd,
        (rows[:, None] < length) & in_head,
        0.0,
    )
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, length, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = tl.load(
            K + keys[:, None].to(tl.int64) * stride_kl + channels[None, :] * stride_kd,
            (keys[:, None] < length) & in_head,
            0.0,
        )
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if BIASED:
            bias = tl.load(key_bias + batch.to(tl.int64) * stride_bias + keys, keys < length, 0.0).to(tl.float32)
            score += tl.maximum(bias * 1.4426950408889634, -1e30)[None, :]
        score = tl.where(keys[None, :] < length, score, float("-inf"))
        highest = tl.maximum(maximum, tl.max(score, 1))
        total = total * tl.exp2(maximum - highest) + tl.sum(tl.exp2(score - highest[:, None]), 1)
        maximum = highest
    result = (maximum + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + (batch.to(tl.int64) * heads + head) * length + rows, result, rows < length)


@triton.jit(do_not_specialize=["tokens", "k_blocks"])
def _block_statistics(
    Q, K, lse, mass, maximum, small, tokens, k_blocks, rows_per_head, scale_log2, epsilon, share,
    PADDED_D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DETAILED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One query block of one head, added to what earlier batch entries left. Grid: (query blocks, H).

    Q `[H, blocks * BLOCK_Q, PADDED_D]`, K `[H, tokens, PADDED_D]` reordered; lse in log2 units, +inf in padding.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, PADDED_D)
    columns = tl.arange(0, KEYS)
    Q += head.to(tl.int64) * rows_per_head * PADDED_D
    K += head.to(tl.int64) * tokens * PADDED_D
    lse += head * rows_per_head
    out = (head * tl.num_programs(0) + block).to(tl.int64) * k_blocks
    for part in tl.static_range(0, BLOCK_Q, ROWS):
        rows = block * BLOCK_Q + part + tl.arange(0, ROWS)
        q = tl.load(Q + rows[:, None] * PADDED_D + channels[None, :])
        row_lse = tl.load(lse + rows)
        real = row_lse < float("inf")
        for start in range(0, k_blocks):
            keys = start * KEYS + columns
            k = tl.load(K + keys[:, None] * PADDED_D + channels[None, :], keys[:, None] < tokens, 0.0)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - row_lse[:, None]
            inside = real[:, None] & (keys < tokens)[None, :]
            weight = tl.where(inside, tl.exp2(score), 0.0)
            tl.store(mass + out + start, tl.load(mass + out + start) + tl.sum(weight) * share)
            if DETAILED:
                tl.store(maximum + out + start, tl.maximum(tl.load(maximum + out + start), tl.max(weight)))
                count = tl.sum((inside & (weight < epsilon)).to(tl.float32))
                tl.store(small + out + start, tl.load(small + out + start) + count * share)


@triton.jit(do_not_specialize=["tokens", "pools"])
def _pooled_mass(
    Q, pooled, lse, mass, tokens, pools, rows_per_head, scale_log2, share,
    PADDED_D: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Mass of each pool if its mean key stood for all of its keys. Grid: (query blocks, H); pooled float32."""
    block, head = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, PADDED_D)
    Q += head.to(tl.int64) * rows_per_head * PADDED_D
    pooled += head.to(tl.int64) * pools * PADDED_D
    lse += head * rows_per_head
    out = (head * tl.num_programs(0) + block).to(tl.int64) * pools
    for start in range(0, pools, KEYS):
        pool = start + tl.arange(0, KEYS)
        k = tl.load(pooled + pool[:, None] * PADDED_D + channels[None, :], (pool < pools)[:, None], 0.0)
        count = tl.maximum(tl.minimum(tokens - pool * POOL, POOL), 1)
        log_count = tl.log2(count.to(tl.float32))
        total = tl.zeros([KEYS], tl.float32)
        for part in tl.static_range(0, BLOCK_Q, ROWS):
            rows = block * BLOCK_Q + part + tl.arange(0, ROWS)
            q = tl.load(Q + rows[:, None] * PADDED_D + channels[None, :]).to(tl.float32)
            score = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale_log2 + log_count[None, :]
            total += tl.sum(tl.exp2(score - tl.load(lse + rows)[:, None]), 0)
        before = tl.load(mass + out + pool, pool < pools, 0.0)
        tl.store(mass + out + pool, before + total * share, pool < pools)


def _precision(dtype: torch.dtype) -> str:
    """Products of float32 inputs in three TF32 parts, as exact as float32; 16-bit inputs are exact anyway."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _padded(head_dim: int) -> int:
    return max(32, triton.next_power_of_2(head_dim))


def launch_row_logsumexp(
    q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None, key_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The Triton counterpart of `statistics_reference.row_logsumexp_reference`."""
    batch, heads, length, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    _row_logsumexp[(triton.cdiv(length, ROWS), heads, batch)](
        q, k, key_bias, lse, *q.stride(), *k.stride(), 0 if key_bias is None else key_bias.stride(0),
        heads, heads // k.shape[1], k.shape[2], scale * math.log2(math.e),
        D=dim, PADDED_D=_padded(dim), ROWS=ROWS, KEYS=BLOCK_K, BIASED=key_bias is not None,
        PRECISION=_precision(q.dtype), num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return lse


def launch_block_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
    rows: torch.Tensor,
    *,
    q_blocks: torch.Tensor | None = None,
    scale: float | None = None,
    epsilon: float | None = None,
    pool: int | None = None,
) -> BlockStatistics:
    """The Triton counterpart of `statistics_reference.block_statistics_reference`."""
    g = geometry
    batch, heads, _, dim = q.shape
    device, padded = q.device, _padded(dim)
    scale = dim**-0.5 if scale is None else scale
    scale_log2 = scale * math.log2(math.e)
    blocks = torch.arange(g.q_blocks, device=device) if q_blocks is None else q_blocks.to(device)
    position = (blocks[:, None] * g.block_q + torch.arange(g.block_q, device=device)).flatten()
    real = position < g.grid_tokens
    position = position.clamp_max(g.grid_tokens - 1)
    shape = (heads, blocks.numel(), g.k_blocks)
    mass = torch.zeros(shape, device=device)
    maximum, small = (torch.zeros(shape, device=device) for _ in range(2)) if epsilon is not None else (None, None)
    pools = 0 if pool is None else -(-g.grid_tokens // pool)
    pool_mass = torch.zeros(heads, blocks.numel(), pools, device=device) if pool is not None else None
    per_head = (g.grid_tokens + position.numel()) * padded * q.element_size()
    step = max(1, REORDER_BYTES // per_head)
    group = heads // k.shape[1]
    padding = (0, padded - dim)
    for b in range(batch):
        for first in range(0, heads, step):
            part = torch.arange(first, min(first + step, heads), device=device)
            source = rows[part].long() + g.prefix
            keys = torch.nn.functional.pad(k[b][part[:, None] // group, source], padding).contiguous()
            chosen = source[:, position]
            queries = torch.nn.functional.pad(q[b][part[:, None], chosen], padding).contiguous()
            row_lse = (lse[b][part[:, None], chosen] * math.log2(math.e)).masked_fill(~real, torch.inf).contiguous()
            some = slice(first, first + part.numel())
            grid = (blocks.numel(), part.numel())
            _block_statistics[grid](
                queries, keys, row_lse, mass[some],
                None if maximum is None else maximum[some], None if small is None else small[some],
                g.grid_tokens, g.k_blocks, position.numel(), scale_log2, epsilon or 0.0, 1 / batch,
                PADDED_D=padded, BLOCK_Q=g.block_q, ROWS=ROWS, KEYS=g.block_k, DETAILED=epsilon is not None,
                PRECISION=_precision(q.dtype), num_warps=4, num_stages=3, enable_fp_fusion=True,
            )  # fmt: skip
            if pool is not None:
                _pooled_mass[grid](
                    queries, pool_rows(keys.float(), pool).contiguous(), row_lse, pool_mass[some],
                    g.grid_tokens, pools, position.numel(), scale_log2, 1 / batch,
                    PADDED_D=padded, BLOCK_Q=g.block_q, ROWS=ROWS, KEYS=g.block_k, POOL=pool,
                    num_warps=4, num_stages=2, enable_fp_fusion=True,
                )  # fmt: skip
    if small is not None:
        cells = torch.full((g.k_blocks,), g.block_k, device=device)
        cells[-1] -= -g.grid_tokens % g.block_k
        small /= real.view(blocks.numel(), -1).sum(1)[None, :, None] * cells
    pooled = None
    if pool is not None:
        per_block = g.block_k // pool
        pooled = torch.nn.functional.pad(pool_mass, (0, -pools % per_block)).unflatten(2, (-1, per_block)).sum(3)
    return BlockStatistics(mass, maximum, small, pooled)
