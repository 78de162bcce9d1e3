"""The error that INT8 makes in the logits, with and without a rotation of queries and keys, from a few rows."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..core.inputs import ScoreInputs
from ..core.layout import Geometry
from ..core.precision import FORMATS
from ..core.quantization import fake_quantize, fake_quantize_blocks, hadamard_matrix

# Query rows and key blocks of each head that are looked at.
ROWS = 16
BLOCKS = 16
PLAIN, ROTATED, UNSMOOTHED = range(3)
CASES = ("plain", "rotated", "without smooth-K")


def logit_errors(scores: ScoreInputs, geometry: Geometry, tables: torch.Tensor) -> torch.Tensor:
    """Mean squared INT8 error of the logits of each head, float32 `[Hq, 3]`: plain, rotated, without smooth-K.

    tables int `[Hq, N]`: grid index at each position of the head's order. The bias of keys is not looked at. Queries
    have a scale per token, keys per block of 64 after their mean over all tokens is taken away, as in the kernels. The
    error of a row is its variance under the row's softmax over the keys that are looked at.
    """
    g, q, k, heads, group, scale = geometry, scores.q, scores.k, scores.heads, scores.group, scores.score_scale
    device = q.device
    rotation = _rotation(scores.dim, device)
    rows, places = _looked_at(g, device)
    source = tables.long() + g.prefix
    head = torch.arange(heads, device=device)[:, None]
    result = torch.zeros(heads, len(CASES), device=device)
    int8 = FORMATS["int8"]
    for b in range(scores.batch):
        queries = q[b][head, source[:, rows]].float()
        keys = k[b][head // group, source[:, places]].float()
        mean = k[b].mean(1, dtype=torch.float32).repeat_interleave(group, 0)[:, None]
        exact = queries @ (keys - mean).transpose(1, 2) * scale
        weights = exact.softmax(2)
        # The cases of `CASES`, all at once: launches take the time.
        a = torch.stack([queries, queries @ rotation, queries])
        c = torch.stack([keys - mean, (keys - mean) @ rotation, keys])
        product = fake_quantize(a, int8, -1) @ fake_quantize_blocks(c, int8, g.block_k).transpose(2, 3) * scale
        wrong = product - exact
        constant = (weights * wrong).sum(3, keepdim=True)
        result += (weights * (wrong - constant).square()).sum(3).mean(2).T / scores.batch
    return result


@lru_cache(maxsize=4)
def _rotation(dim: int, device: torch.device) -> torch.Tensor:
    """Every site wants the same, and making it takes two dozen launches."""
    return hadamard_matrix(dim, device)


@lru_cache(maxsize=4)
def _looked_at(g: Geometry, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions in the order of the rows and of the keys that are looked at, int64 `[n]` and `[n * block_k]`."""
    rows = torch.linspace(0, g.grid_tokens - 1, min(ROWS, g.grid_tokens), device=device).round().long()
    blocks = torch.linspace(0, g.k_blocks - 1, min(BLOCKS, g.k_blocks), device=device).round().long()
    places = (blocks[:, None] * g.block_k + torch.arange(g.block_k, device=device)).flatten()
    # A short last block: its keys come twice, which changes neither its scale nor what is measured.
    return rows, torch.where(places < g.grid_tokens, places, blocks.repeat_interleave(g.block_k) * g.block_k)
