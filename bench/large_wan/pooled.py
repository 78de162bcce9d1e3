"""The host's block-sparse attention (`comfy_kitchen.sol_attn`, top-k) in plain PyTorch, for calls and devices that its
kernel does not serve."""

from __future__ import annotations

import math

import torch

from ...kernels.core.layout import TokenLayout

BLOCK = 64


def _means(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Means of every BLOCK rows of x `[H, L, D]`, `[H, blocks, D]`; counts float32 `[blocks]`."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    return padded.sum(2) / counts[:, None]


def pooled_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, density: float
) -> tuple[torch.Tensor, float]:
    """Attention over key blocks that are chosen by block means; the mean key and value stand for every other one.

    q, k, v `[1, H, L, D]`. Blocks are 64 tokens of the whole sequence in the model's own order. A block of queries
    keeps the round(density * blocks) key blocks whose mean key has the largest products with its mean query, beside
    them itself and both neighbours, and the blocks that hold context tokens, whose own rows keep everything. All rows
    of a block share the weight of what stands for a dropped one, which is that of their mean query. Returns float32
    `[1, H, L, D]` and kept blocks / all blocks. ValueError for more than one sample.
    """
    if q.shape[0] != 1:
        raise ValueError("pooled_attention: one sample is expected")
    q, k, v = (x[0].float() for x in (q, k, v))
    length, scale, device = q.shape[1], q.shape[2] ** -0.5, q.device
    blocks = -(-length // BLOCK)
    number = torch.arange(blocks, device=device)
    counts = (length - BLOCK * number).clamp_max(BLOCK).float()
    # The shared weights of a block are of its mean query, those of kept keys of each row: only with keys around zero
    # are they on one level.
    k = k - _means(k, counts).mean(1, keepdim=True)
    scores = _means(q, counts) @ _means(k, counts).mT * scale
    starts = BLOCK * number
    context = (starts < layout.prefix) | (starts + counts > layout.prefix + layout.grid_tokens)
    free = blocks - int(context.sum())
    best = scores.masked_fill(context, -math.inf).topk(max(0, min(free - 1, max(1, round(density * free)))), 2).indices
    near = (number[:, None] - number).abs() <= 1
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, True) | near | context | context[:, None]
    of_row = torch.arange(length, device=device) // BLOCK
    pooled, values = scores.masked_fill(kept, -math.inf) + counts.log(), _means(v, counts)
    out = torch.empty_like(q)
    for head in range(q.shape[0]):
        single = (q[head] @ k[head].T * scale).masked_fill_(~kept[head][of_row][:, of_row], -math.inf)
        weights = torch.cat([single, pooled[head][of_row]], 1).softmax(1)
        out[head] = weights[:, :length] @ v[head] + weights[:, length:] @ values[head]
    return out[None], kept.float().mean().item()
