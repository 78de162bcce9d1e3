"""Block statistics of post-softmax attention in plain PyTorch, streamed over rows: never an L x L matrix.

Two passes (reference for the Triton kernels): the log-sum-exp of every row, then sums, maxima and counts of small
values per block under an order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.gather import CHUNK_ELEMENTS, block_positions
from ..core.inputs import ScoreInputs
from ..core.layout import Geometry


@dataclass(frozen=True)
class BlockStatistics:
    """Per head, for the query blocks that were looked at; float32, means over the batch.

    mass    [H, n, k_blocks]: sum of attention weights over the block's rows and keys (a row sums to 1 over all keys).
    maximum [H, n, k_blocks]: largest weight, or None.  small [H, n, k_blocks]: share of weights below epsilon, or None.
    """

    mass: torch.Tensor
    maximum: torch.Tensor | None = None
    small: torch.Tensor | None = None


def row_logsumexp_reference(scores: ScoreInputs) -> torch.Tensor:
    """Log-sum-exp over keys of `scale * q k^T + key_bias`, float32 `[B, Hq, n]`; q may be any n rows."""
    q, scale = scores.q, scores.score_scale
    k = scores.k.float().repeat_interleave(scores.group, 1)
    result = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    step = max(1, CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        logits = (q[:, :, start : start + step].float() @ k.transpose(2, 3)) * scale
        if scores.key_bias is not None:
            logits += scores.key_bias.float()[:, None, None, :]
        result[:, :, start : start + step] = logits.logsumexp(3)
    return result


def block_statistics_reference(
    scores: ScoreInputs,
    lse: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    q_blocks: torch.Tensor | None = None,
    epsilon: float | None = None,
) -> BlockStatistics:
    """Statistics of the grid-to-grid part under one order per head.

    lse `[B, Hq, L]` of full rows (context keys included); the grid's own keys have no bias beside it. tables int
    `[Hq, N]`: grid index at each position of the head's order. q_blocks: int64 indices of the query blocks to look at
    (None: all). epsilon: also maxima and the share of weights below epsilon.
    """
    g, scale = geometry, scores.score_scale
    q, k, batch, heads = scores.q, scores.k, scores.batch, scores.heads
    blocks = torch.arange(g.q_blocks, device=q.device) if q_blocks is None else q_blocks
    shape = (heads, blocks.numel(), g.k_blocks)
    mass = torch.zeros(shape, device=q.device)
    maximum = small = None
    if epsilon is not None:
        maximum, small = torch.zeros(shape, device=q.device), torch.zeros(shape, device=q.device)
    key_padding = -g.grid_tokens % g.block_k
    cells = torch.full((g.k_blocks,), g.block_k, device=q.device)
    cells[-1] -= key_padding
    step = max(1, CHUNK_ELEMENTS // (g.block_q * g.grid_tokens))
    for b in range(batch):
        for h in range(heads):
            source = tables[h].long() + g.prefix
            kh = k[b, h // scores.group].float()[source]
            qh = q[b, h].float()[source]
            row_lse = lse[b, h][source]
            for first in range(0, blocks.numel(), step):
                chosen = blocks[first : first + step]
                position, real = block_positions(g, chosen)
                q_rows = qh[position]
                row_bias = row_lse[position].masked_fill(~real, torch.inf)[..., None]
                weights = torch.exp(q_rows @ kh.T * scale - row_bias)
                tiles = torch.nn.functional.pad(weights, (0, key_padding)).unflatten(2, (g.k_blocks, g.block_k))
                out = slice(first, first + chosen.numel())
                mass[h, out] += tiles.sum((1, 3)) / batch
                if epsilon is not None:
                    torch.maximum(maximum[h, out], tiles.amax((1, 3)), out=maximum[h, out])
                    counted = (tiles < epsilon) & real[:, :, None, None]
                    counted = counted.sum((1, 3)) - (real.sum(1)[:, None] * (g.block_k - cells)[None])
                    small[h, out] += counted / (real.sum(1)[:, None] * cells[None]) / batch
    return BlockStatistics(mass, maximum, small)


def query_sums_reference(scores: ScoreInputs, geometry: Geometry, tables: torch.Tensor, per_block: int) -> torch.Tensor:
    """Attention of given queries in every block of keys, under some orders: float32 `[orders, Hq, n, k_blocks]`, sums
    over `per_block` queries each, mean over the batch. What the context's keys get is missing from them.

    scores.q `[B, Hq, orders * n * per_block, D]`, those for the first order first; tables int `[orders, Hq, N]`: grid
    index at each position of an order, which may be another for each head. per_block: a power of two up to 64.
    """
    g, scale, queries, k, key_bias = geometry, scores.score_scale, scores.q, scores.k, scores.key_bias
    batch, heads, count, _ = queries.shape
    orders = tables.shape[0]
    each = count // (orders * per_block)
    mass = torch.zeros(orders, heads, each, g.k_blocks, device=queries.device)
    lse = row_logsumexp_reference(scores)
    step = max(1, CHUNK_ELEMENTS // (per_block * g.grid_tokens))
    for b in range(batch):
        for h in range(heads):
            every_key = k[b, h // scores.group].float()
            of_orders = zip(
                tables[:, h],
                queries[b, h].float().unflatten(0, (orders, each, per_block)),
                lse[b, h].unflatten(0, (orders, each, per_block)),
                mass[:, h],
                strict=True,
            )
            for table, its, its_lse, found in of_orders:
                source = table.long() + g.prefix
                keys, bias = every_key[source], 0 if key_bias is None else key_bias[b].float()[source]
                for first in range(0, each, step):
                    part = slice(first, first + step)
                    weights = torch.exp(its[part] @ keys.T * scale + bias - its_lse[part, :, None])
                    tiles = torch.nn.functional.pad(weights, (0, -g.grid_tokens % g.block_k))
                    found[part] += tiles.unflatten(2, (g.k_blocks, g.block_k)).sum((1, 3)) / batch
    return mass
