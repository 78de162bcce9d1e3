"""What mask and tail get wrong for the mean query of every few rows, in plain PyTorch: the kernel's reference.

Delta attention (arXiv 2505.11254) gives back to all rows what a sparse attention missed for one row in so many. Here it
is missed for their *mean* query, and each head takes the share of it that helps (`paro_runtime.correction`): in heads
that look everywhere it is nearly all the error, in heads that look at one place it is none of it.
"""

from __future__ import annotations

import math

import torch

from .pools import expanded_pools, mean_queries, stretch_of_rows, stretches_of
from .problem import SparsePattern
from .reference import pool_rows, reordered_index, take_rows

# Keys per pool.
POOL = 64
# Rows that share a mean query, as far as a query block has as many: then they share a row of the mask.
ROWS_CHOICES = (8, 16, 32, 64, 128)


def query_groups(pattern: SparsePattern, rows: int) -> int:
    """Mean queries of a head, each of so many rows that follow each other in its order; the last of what is there."""
    return -(-pattern.geometry.grid_tokens // rows)


def problem_with_correction(q: torch.Tensor, pattern: SparsePattern, heads: torch.Tensor, rows: int) -> str | None:
    """Say in one line what makes a correction impossible, or None; the call itself has been checked."""
    if pattern.kept_words is None or pattern.tail_bias is None:
        return "correction: the pattern has no mask or no tail"
    if pattern.pool != POOL:
        return f"correction: pools of {POOL} keys are supported, got {pattern.pool}"
    if heads.dim() != 1 or heads.dtype != torch.int32 or heads.device != q.device:
        return f"correction: heads must be int32 [n] on {q.device}, got {heads.dtype} {list(heads.shape)}"
    if rows not in ROWS_CHOICES or rows > pattern.geometry.block_q:
        return f"correction: a mean query is of {ROWS_CHOICES} rows, at most a query block's, got {rows}"
    return None


def query_corrections_reference(
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
    """Dense attention of each mean query minus that with its rows' row of the mask and their tail.

    q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]`, heads int32 `[n]`: the query heads wanted. rows: of a mean query, one
    of ROWS_CHOICES. key_bias `[B, L]`, additive. Returns float32 (float64 of float64) `[B, n, query_groups, D]`, groups
    of rows in the head's order.
    """
    g = pattern.geometry
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    index = reordered_index(pattern, q.shape[1])
    first = torch.arange(query_groups(pattern, rows)) * rows
    kept, block = pattern.mask, first.to(q.device) // g.block_q
    stretch = stretch_of_rows(g, stretches_of(g, pattern.expansions), first)
    result = torch.empty(q.shape[0], heads.numel(), first.numel(), q.shape[3], dtype=work, device=q.device)
    for i, head in enumerate(heads.tolist()):
        its = index[head : head + 1]
        ordered, keys, values = (
            take_rows(x[:, h : h + 1].to(work), its) for x, h in ((q, head), (k, head // group), (v, head // group))
        )
        ordered, grid_keys, grid_values = (x[:, :, : g.grid_tokens] for x in (ordered, keys, values))
        queries = pool_rows(ordered, rows)
        logits, grid_bias = queries @ keys.mT * scale, None
        if key_bias is not None:
            bias = key_bias.to(work)[:, None, its[0]]
            logits, grid_bias = logits + bias[:, :, None], bias[:, :, : g.grid_tokens]
        means = mean_queries(ordered, g, pattern.expansions)
        pools = expanded_pools(means, grid_keys, grid_values, pattern.pool, scale=scale, key_bias=grid_bias)
        over_pools = kept[head, block]
        over_keys = over_pools.repeat_interleave(g.block_k, 1)[:, : g.grid_tokens]
        over_keys = torch.nn.functional.pad(over_keys, (0, g.context_tokens), value=True)
        tail = pools.logits(queries, stretch, scale) + pattern.tail_bias[head].to(work)
        sparse = torch.cat([logits.masked_fill(~over_keys, -math.inf), tail.masked_fill(over_pools, -math.inf)], 3)
        of_keys, of_pools = sparse.softmax(3).split([g.length, tail.shape[3]], 3)
        found = of_keys @ values + pools.weighted(of_pools, stretch)
        result[:, i] = (logits.softmax(3) @ values - found)[:, 0]
    return result


def add_corrections_reference(
    out: torch.Tensor,
    corrections: torch.Tensor,
    shares: torch.Tensor,
    pattern: SparsePattern,
    heads: torch.Tensor,
    *,
    rows: int,
) -> torch.Tensor:
    """Add to the grid rows of out `[B, Hq, L, D]`, in place, the share of its head `[Hq]` of each row's correction."""
    g = pattern.geometry
    index = reordered_index(pattern, out.shape[1])[heads.long(), : g.grid_tokens]
    more = corrections.repeat_interleave(rows, 2)[:, :, : g.grid_tokens] * shares[heads.long(), None, None]
    where = index[None, :, :, None].expand(out.shape[0], -1, -1, out.shape[3])
    some = out[:, heads.long()]
    out[:, heads.long()] = some.scatter(2, where, (some.gather(2, where) + more).to(out.dtype))
    return out
