"""Calibration statistics, streamed: row log-sum-exp, then block sums, maxima and small-value counts under an order.

Import only where a launch is wanted: this module needs Triton. The meaning is in `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..core.gather import block_positions
from ..core.inputs import ScoreInputs
from ..core.layout import BLOCK_K, Geometry, padded_dim
from ..core.settled import settle
from ..core.support import capability_of
from ..core.triton_gather import LOG2E
from .reference import BlockStatistics

# Bytes of reordered queries and keys at a time; heads are done in groups that fit (at least one head).
REORDER_BYTES = 1 << 29


@triton.jit(do_not_specialize=["stride_bias", "count", "length"])
def _row_logsumexp(
    Q, K, key_bias, lse,
    stride_qb, stride_qh, stride_ql, stride_qd, stride_kb, stride_kh, stride_kl, stride_kd, stride_bias,
    heads, group, count, length, scale_log2,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS of `count` rows of one head; lse float32 `[B, H, count]`. Grid: (ceil(count / ROWS), H, B)."""
    head, batch = tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, PADDED_D)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    Q += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    K += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    in_head = channels[None, :] < D
    q = tl.load(
        Q + rows[:, None].to(tl.int64) * stride_ql + channels[None, :] * stride_qd,
        (rows[:, None] < count) & in_head,
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
    tl.store(lse + (batch.to(tl.int64) * heads + head) * count + rows, result, rows < count)


@triton.jit(do_not_specialize=["tokens", "q_blocks", "k_blocks"])
def _block_statistics(
    Q, K, lse, mass, maximum, small, tokens, q_blocks, k_blocks, rows_per_head, scale_log2, epsilon, share,
    PADDED_D: tl.constexpr, PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
    DETAILED: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS / PER_BLOCK query blocks (at least one) of one head, BLOCKS key blocks at a time.

    Q `[H, rows_per_head, PADDED_D]` holds PER_BLOCK rows of each query block, K `[H, tokens, PADDED_D]` is reordered;
    lse in log2 units, +inf in padding. ACCUMULATE: add to what earlier batch entries left. Grid: (programs, H).
    """
    GROUPS: tl.constexpr = ROWS // PER_BLOCK if PER_BLOCK < ROWS else 1
    SPAN: tl.constexpr = PER_BLOCK if PER_BLOCK > ROWS else ROWS
    program, head = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, PADDED_D)
    columns = tl.arange(0, BLOCKS * KEYS)
    Q += head.to(tl.int64) * rows_per_head * PADDED_D
    K += head.to(tl.int64) * tokens * PADDED_D
    lse += head * rows_per_head
    block = program * GROUPS + tl.arange(0, GROUPS)
    out = (head * q_blocks + block).to(tl.int64) * k_blocks
    for part in tl.static_range(0, SPAN, ROWS):
        rows = program * SPAN + part + tl.arange(0, ROWS)
        q = tl.load(Q + rows[:, None] * PADDED_D + channels[None, :])
        row_lse = tl.load(lse + rows)
        real = row_lse < float("inf")
        for start in range(0, k_blocks, BLOCKS):
            keys = start * KEYS + columns
            k = tl.load(K + keys[:, None] * PADDED_D + channels[None, :], keys[:, None] < tokens, 0.0)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - row_lse[:, None]
            # Rows of padding are zero by their lse.
            weight = tl.where((keys < tokens)[None, :], tl.exp2(score), 0.0)
            at = start + tl.arange(0, BLOCKS)
            valid = (block < q_blocks)[:, None] & (at < k_blocks)[None, :]
            at = out[:, None] + at[None, :]
            total = tl.sum(tl.reshape(weight, [ROWS, BLOCKS, KEYS]), 2)
            total = tl.sum(tl.reshape(total, [GROUPS, ROWS // GROUPS, BLOCKS]), 1) * share
            if ACCUMULATE or part > 0:
                total += tl.load(mass + at, valid, 0.0)
            tl.store(mass + at, total, valid)
            if DETAILED:
                largest = tl.max(tl.reshape(weight, [ROWS, BLOCKS, KEYS]), 2)
                largest = tl.max(tl.reshape(largest, [GROUPS, ROWS // GROUPS, BLOCKS]), 1)
                tiny = (real[:, None] & (keys < tokens)[None, :] & (weight < epsilon)).to(tl.float32)
                count = tl.sum(tl.reshape(tiny, [ROWS, BLOCKS, KEYS]), 2)
                count = tl.sum(tl.reshape(count, [GROUPS, ROWS // GROUPS, BLOCKS]), 1) * share
                if ACCUMULATE or part > 0:
                    largest = tl.maximum(largest, tl.load(maximum + at, valid, 0.0))
                    count += tl.load(small + at, valid, 0.0)
                tl.store(maximum + at, largest, valid)
                tl.store(small + at, count, valid)


@triton.jit(do_not_specialize=["count"])
def _take_rows(
    X, index, out, stride_h, stride_l, stride_d, first_head, group, count,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head, zeros from channel D on. index int64 `[H, count]`. Grid: (ceil(count / ROWS), H)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, PADDED_D)
    head = tl.program_id(1)
    source = tl.load(index + head.to(tl.int64) * count + rows, rows < count, 0)
    X += ((first_head + head) // group).to(tl.int64) * stride_h
    inside = (rows < count)[:, None]
    x = tl.load(X + source[:, None] * stride_l + channels[None, :] * stride_d, inside & (channels < D)[None, :], 0.0)
    place = (head.to(tl.int64) * count + rows)[:, None] * PADDED_D + channels[None, :]
    tl.store(out + place, x, inside)


@dataclass(frozen=True)
class StatisticsTile:
    """rows: query rows per program at most. keys: keys per step. warps, stages: Triton's launch options."""

    rows: int
    keys: int
    warps: int
    stages: int


def statistics_tile(capability: tuple[int, int] | None, padded: int, wide: bool) -> StatisticsTile:
    """The tile of both passes over Q K^T: 99 KiB of shared memory are enough except on data-centre GPUs.

    capability None: not an NVIDIA GPU. wide: float32 inputs.
    """
    if padded > 128 or wide:
        return StatisticsTile(64, BLOCK_K, 4, 1)
    if capability is not None and capability[0] in (9, 10):
        return StatisticsTile(128, 2 * BLOCK_K, 8, 2)
    return StatisticsTile(128, BLOCK_K, 8, 3)


def tile_of(q: torch.Tensor) -> StatisticsTile:
    """The tile for queries `[B, H, L, D]`."""
    # The interpreter has no shared memory to run out of.
    return statistics_tile(capability_of(q.device), padded_dim(q.shape[3]), q.dtype == torch.float32)


def product_precision(dtype: torch.dtype) -> str:
    """Products of float32 inputs in three TF32 parts, as exact as float32; 16-bit inputs are exact anyway."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def take_rows(x: torch.Tensor, heads: slice, group: int, index: torch.Tensor) -> torch.Tensor:
    """Rows `index [h, n]` (int64) of the query heads `heads` from x `[H / group, L, D]`: `[h, n, D padded]`."""
    count, dim = index.shape[1], x.shape[2]
    padded = padded_dim(dim)
    out = torch.empty(index.shape[0], count, padded, dtype=x.dtype, device=x.device)
    _take_rows[(triton.cdiv(count, 64), index.shape[0])](
        x, index, out, *x.stride(), heads.start, group, count, D=dim, PADDED_D=padded, ROWS=64, num_warps=4
    )
    return out


def balanced(count: int, limit: int) -> int:
    """Size of the fewest parts of at most `limit` (at least one) that `count` things can be cut into evenly."""
    return -(-count // -(-count // max(1, limit)))


def launch_row_logsumexp(scores: ScoreInputs) -> torch.Tensor:
    """The Triton counterpart of `reference.row_logsumexp_reference`."""
    q, k, key_bias = scores.q, scores.k, scores.key_bias
    batch, heads, length, dim = q.shape
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    tile = tile_of(q)
    _row_logsumexp[(triton.cdiv(length, tile.rows), heads, batch)](
        q, k, key_bias, lse, *q.stride(), *k.stride(), scores.bias_stride(),
        heads, scores.group, length, k.shape[2], scores.score_scale * LOG2E,
        D=dim, PADDED_D=padded_dim(dim), ROWS=tile.rows, KEYS=tile.keys, BIASED=key_bias is not None,
        PRECISION=product_precision(q.dtype), num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return lse


def launch_block_statistics(
    scores: ScoreInputs,
    lse: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    q_blocks: torch.Tensor | None = None,
    epsilon: float | None = None,
) -> BlockStatistics:
    """The Triton counterpart of `reference.block_statistics_reference`."""
    g, q, k, batch, heads = geometry, scores.q, scores.k, scores.batch, scores.heads
    device, padded, scale_log2 = q.device, padded_dim(scores.dim), scores.score_scale * LOG2E
    blocks = torch.arange(g.q_blocks, device=device) if q_blocks is None else q_blocks.to(device)
    tile = tile_of(q)
    position, real = block_positions(g, blocks)
    position, real = position.flatten(), real.flatten()
    span = max(g.block_q, tile.rows)
    padding = (0, -position.numel() % span)
    position, every = torch.nn.functional.pad(position, padding), torch.nn.functional.pad(real, padding)
    shape = (heads, blocks.numel(), g.k_blocks)
    mass = torch.empty(shape, device=device)
    maximum, small = (torch.empty(shape, device=device) for _ in range(2)) if epsilon is not None else (None, None)
    per_head = (g.grid_tokens + position.numel()) * padded * q.element_size()
    step = balanced(heads, REORDER_BYTES // per_head)
    for b in range(batch):
        for first in range(0, heads, step):
            some = slice(first, min(first + step, heads))
            source = tables[some].long() + g.prefix
            keys = take_rows(k[b], some, scores.group, source)
            chosen = source[:, position]
            queries = take_rows(q[b], some, 1, chosen)
            row_lse = (lse[b, some].gather(1, chosen) * LOG2E).masked_fill(~every, torch.inf)
            _block_statistics[(position.numel() // span, source.shape[0])](
                queries, keys, row_lse, mass[some],
                None if maximum is None else maximum[some], None if small is None else small[some],
                g.grid_tokens, blocks.numel(), g.k_blocks, position.numel(), scale_log2, epsilon or 0.0, 1 / batch,
                PADDED_D=padded, PER_BLOCK=g.block_q, ROWS=tile.rows, KEYS=g.block_k, BLOCKS=tile.keys // g.block_k,
                DETAILED=epsilon is not None, ACCUMULATE=b > 0, PRECISION=product_precision(q.dtype),
                num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
            )  # fmt: skip
    if small is not None:
        cells = torch.full((g.k_blocks,), g.block_k, device=device)
        cells[-1] -= -g.grid_tokens % g.block_k
        small /= real.view(blocks.numel(), -1).sum(1)[None, :, None] * cells
    return BlockStatistics(mass, maximum, small)


settle(globals())
