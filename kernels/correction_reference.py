"""What mask and tail get wrong for the mean query of each query block, in plain PyTorch: the kernel's reference.

Delta attention (arXiv 2505.11254) gives back to all rows what a sparse attention missed for one row in so many. Here it
is missed for their *mean* query, and each head takes the share of it that helps (`paro_runtime.correction`): in heads
that look everywhere it is nearly all the error, in heads that look at one place it is none of it.
"""

from __future__ import annotations

import math

import torch

from .problem import SparsePattern
from .reference import pool_counts, pool_rows, reordered_index, take_rows

# Keys per pool.
POOL = 64


def query_groups(pattern: SparsePattern) -> int:
    """Rows that share a mean query are those of a query block, which share a row of the mask: as many as those."""
    return pattern.geometry.q_blocks


def problem_with_correction(q: torch.Tensor, pattern: SparsePattern, heads: torch.Tensor) -> str | None:
    """Say in one line what makes a correction impossible, or None; the call itself has been checked."""
    if pattern.kept_words is None or pattern.tail_bias is None:
        return "correction: the pattern has no mask or no tail"
    if pattern.pool != POOL:
        return f"correction: pools of {POOL} keys are supported, got {pattern.pool}"
    if heads.dim() != 1 or heads.dtype != torch.int32 or heads.device != q.device:
        return f"correction: heads must be int32 [n] on {q.device}, got {heads.dtype} {list(heads.shape)}"
    return None


def query_corrections_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: SparsePattern,
    heads: torch.Tensor,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense attention of each query block's mean query minus that with the block's row of the mask and the tail.

    q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]`, heads int32 `[n]`: the query heads wanted. key_bias `[B, L]`, additive.
    Returns float32 (float64 of float64) `[B, n, q_blocks, D]`, blocks of rows in the head's order.
    """
    g = pattern.geometry
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    index = reordered_index(pattern, q.shape[1])
    kept = pattern.mask
    log_counts = pool_counts(g.grid_tokens, pattern.pool, q.device).to(work).log()
    result = torch.empty(q.shape[0], heads.numel(), query_groups(pattern), q.shape[3], dtype=work, device=q.device)
    for i, head in enumerate(heads.tolist()):
        its = index[head : head + 1]
        queries, keys, values = (
            take_rows(x[:, h : h + 1].to(work), its)[:, 0]
            for x, h in ((q, head), (k, head // group), (v, head // group))
        )
        queries, pooled_keys, pooled_values = (
            pool_rows(x[:, : g.grid_tokens], size)
            for x, size in ((queries, g.block_q), (keys, pattern.pool), (values, pattern.pool))
        )
        logits = queries @ keys.transpose(1, 2) * scale
        if key_bias is not None:
            logits += key_bias.to(work)[:, its[0]][:, None]
        over_keys = kept[head].repeat_interleave(g.block_k, 1)[:, : g.grid_tokens]
        over_keys = torch.nn.functional.pad(over_keys, (0, g.context_tokens), value=True)
        over_pools = kept[head].repeat_interleave(g.block_k // pattern.pool, 1)[:, : log_counts.numel()]
        tail = queries @ pooled_keys.transpose(1, 2) * scale + log_counts + pattern.tail_bias[head].to(work)
        sparse = torch.cat([logits.masked_fill(~over_keys, -math.inf), tail.masked_fill(over_pools, -math.inf)], 2)
        result[:, i] = logits.softmax(2) @ values - sparse.softmax(2) @ torch.cat([values, pooled_values], 1)
    return result


def add_corrections_reference(
    out: torch.Tensor, corrections: torch.Tensor, shares: torch.Tensor, pattern: SparsePattern, heads: torch.Tensor
) -> torch.Tensor:
    """Add to the grid rows of out `[B, Hq, L, D]`, in place, the share of its head `[Hq]` of each row's correction."""
    g = pattern.geometry
    index = reordered_index(pattern, out.shape[1])[heads.long(), : g.grid_tokens]
    rows = corrections.repeat_interleave(g.block_q, 2)[:, :, : g.grid_tokens] * shares[heads.long(), None, None]
    where = index[None, :, :, None].expand(out.shape[0], -1, -1, out.shape[3])
    some = out[:, heads.long()]
    out[:, heads.long()] = some.scatter(2, where, (some.gather(2, where) + rows).to(out.dtype))
    return out
