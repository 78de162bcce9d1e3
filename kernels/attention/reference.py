"""Block-sparse attention with reordering, quantisation and the pooled tail, in plain PyTorch.

This is the meaning of the Triton kernels, the path on hardware without them, and what they are tested against. It
works in float32 (float64 for float64 inputs), in chunks of rows, and never forms an L x L matrix for all heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..core.gather import CHUNK_ELEMENTS, reordered_index, take_rows
from ..core.layout import Geometry
from ..core.pattern import SparsePattern, empty_output, problem_with
from ..core.precision import Format, Precision
from ..core.quantization import fake_quantize, fake_quantize_blocks, hadamard_matrix, rounded_
from ..pooling.reference import Pools, expanded_pools, mean_queries, stretch_of_rows, stretches_of


def _quantize_weights(p: torch.Tensor, to: Format, g: Geometry) -> torch.Tensor:
    """Unnormalised probabilities `[..., L]` in 0..1 as the PV product sees them.

    Integers count from the largest weight of their row and key block (the kernel: of one or two blocks).
    """
    if not to.rounds:
        return p
    if not to.is_integer:
        return rounded_(p * to.largest_weight, to) / to.largest_weight
    parts = []
    for part in (p[..., : g.grid_tokens], p[..., g.grid_tokens :]):
        blocks = torch.nn.functional.pad(part, (0, -part.shape[-1] % g.block_k)).unflatten(-1, (-1, g.block_k))
        step = blocks.amax(-1, keepdim=True).clamp_min(1e-30) / to.largest_weight
        parts.append((rounded_(blocks / step, to) * step).flatten(-2)[..., : part.shape[-1]])
    return torch.cat(parts, -1)


def _chunk_bias(
    pattern: SparsePattern, kept_blocks: torch.Tensor | None, rows: slice, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Additive masks for query rows `rows` of the reordered sequence: over keys `[H, n, L]`, over pools `[H, n, P]`,
    where it holds the tail's bias too.

    kept_blocks: the pattern's mask.
    """
    g = pattern.geometry
    if kept_blocks is None:
        return None, None
    device = kept_blocks.device
    positions = torch.arange(rows.start, rows.stop, device=device)
    is_context = positions >= g.grid_tokens
    blocks = (positions // g.block_q).clamp_max(g.q_blocks - 1)
    kept = kept_blocks[:, blocks] | is_context[None, :, None]
    over_grid = kept.repeat_interleave(g.block_k, 2)[:, :, : g.grid_tokens]
    over_keys = torch.nn.functional.pad(over_grid, (0, g.context_tokens), value=True)
    keys = torch.zeros(over_keys.shape, dtype=dtype, device=device).masked_fill_(~over_keys, -math.inf)
    if pattern.tail_bias is None:
        return keys, None
    over_pools = kept.repeat_interleave(g.block_k // pattern.pool, 2)[:, :, : -(-g.grid_tokens // pattern.pool)]
    pools = pattern.tail_bias.to(dtype)[:, None, None].expand_as(over_pools)
    return keys, pools.masked_fill(over_pools, -math.inf)


@dataclass(frozen=True)
class _Prepared:
    """What is multiplied, in the order of each head: q, k and v `[B, Hq, L, D]` as they are after smoothing, rotation
    and quantisation; key bias `[B, Hq, L]` or None; pools: of the tail, None without one."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    pools: Pools | None


def _prepared(q, k, v, pattern: SparsePattern, precision: Precision, scale: float, key_bias, index) -> _Prepared:
    """index: as `reordered_index`. Pools are of smoothed and rotated keys, and are rounded like keys of their own."""
    g, (batch, heads, _, dim), group = pattern.geometry, q.shape, q.shape[1] // k.shape[1]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = take_rows(q.to(work), index)
    k, v = (take_rows(x.to(work).repeat_interleave(group, 1), index) for x in (k, v))
    bias = None
    if key_bias is not None:
        bias = key_bias.to(work)[:, None, :].expand(-1, heads, -1).gather(2, index[None].expand(batch, -1, -1))
    if precision.keys.rounds:
        k = k - k.mean(2, keepdim=True)
    if precision.rotates:
        rotation = hadamard_matrix(dim, q.device, work)
        q, k = q @ rotation, k @ rotation
    pools = means = None
    if pattern.kept_words is not None and pattern.tail_bias is not None:
        grid = slice(0, g.grid_tokens)
        means = mean_queries(q[:, :, grid], g, pattern.expansions)
        grid_bias = None if bias is None else bias[:, :, grid]
        pools = expanded_pools(means, k[:, :, grid], v[:, :, grid], pattern.pool, scale=scale, key_bias=grid_bias)
    if precision.keys.rounds:
        q = fake_quantize(q, precision.keys, -1)
        k = torch.cat([fake_quantize_blocks(part, precision.keys, g.block_k) for part in _parts(k, g)], 2)
        if pools is not None:
            pools = pools.with_keys(fake_quantize(pools.keys, precision.keys, -1), means, scale)
    return _Prepared(q, k, fake_quantize(v, precision.values, 2), bias, pools)


def sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: SparsePattern,
    precision: Precision,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over the kept blocks of each head's reordered sequence.

    q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]`, any strides and floating dtype. key_bias: additive `[B, L]` in original
    token order (-inf hides a key). scale defaults to 1/sqrt(D). Returns `[B, Hq, L, D]` in q's dtype and original token
    order, written to `out` if given. Raises ValueError with one line when the call does not fit the pattern.
    """
    reason = problem_with(q, k, v, pattern)
    if reason:
        raise ValueError(reason)
    g, heads = pattern.geometry, q.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    index, mask = reordered_index(pattern, heads), pattern.mask
    x = _prepared(q, k, v, pattern, precision, scale, key_bias, index)
    result = torch.empty_like(x.q)
    step = max(1, CHUNK_ELEMENTS // max(1, q.shape[0] * heads * g.length))
    for start in range(0, g.length, step):
        rows = slice(start, min(start + step, g.length))
        scores = (x.q[:, :, rows] @ x.k.transpose(2, 3)) * scale
        keys_bias, pools_bias = _chunk_bias(pattern, mask, rows, x.q.dtype)
        for added in (keys_bias, None if x.bias is None else x.bias[:, :, None, :]):
            if added is not None:
                scores += added
        if pools_bias is not None:
            positions = torch.arange(rows.start, rows.stop).clamp_max(g.grid_tokens - 1)
            stretch = stretch_of_rows(g, stretches_of(g, pattern.expansions), positions)
            scores = torch.cat([scores, x.pools.logits(x.q[:, :, rows], stretch, scale) + pools_bias], 3)
        weights = (scores - scores.amax(3, keepdim=True)).exp()
        total = weights.sum(3, keepdim=True)
        chunk = _quantize_weights(weights[..., : g.length], precision.values, g) @ x.v
        # The tail's product is in 16 bits whatever pv is: it is small, its weights are large.
        if pools_bias is not None:
            chunk += x.pools.weighted(weights[..., g.length :], stretch)
        result[:, :, rows] = chunk / total
    out = empty_output(q) if out is None else out
    return out.copy_(take_rows(result, torch.argsort(index, 1)))


def _parts(x: torch.Tensor, g: Geometry) -> list[torch.Tensor]:
    """Grid and context rows of a reordered `[B, H, L, D]` tensor; each has blocks of its own."""
    return [part for part in (x[:, :, : g.grid_tokens], x[:, :, g.grid_tokens :]) if part.shape[2]]
