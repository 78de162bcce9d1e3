"""Whether a site's queries and keys are rotated before they are quantised, from errors measured while calibrating.

A Hadamard rotation spreads channels that are much larger than the others, so that they no longer set the scale of all;
where there are none it gains nothing and costs the pre-pass a product with a matrix. So each site is measured: the
error that INT8 makes in the logits, under the softmax, where a constant error changes nothing. It is the relative error
of the attention weights. The 4-bit precisions always rotate, the 16-bit ones never.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ...kernels.core.pattern import Geometry
from ...kernels.core.quantization import LEVELS, fake_quantize, fake_quantize_blocks, hadamard_matrix

# Query rows and key blocks of each head that are looked at.
ROWS = 16
BLOCKS = 16
# A site rotates if its error is above the floor and rotation divides it by the margin. Unit normal queries and keys
# have an error of 0.01.
FLOOR = 0.015
MARGIN = 1.3
PLAIN, ROTATED, UNSMOOTHED = range(3)
CASES = ("plain", "rotated", "without smooth-K")


def logit_errors(
    q: torch.Tensor, k: torch.Tensor, geometry: Geometry, tables: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """Mean squared INT8 error of the logits of each head, float32 `[Hq, 3]`: plain, rotated, without smooth-K.

    q `[B, Hq, L, D]`, k `[B, Hkv, L, D]`, tables int `[Hq, N]`: grid index at each position of the head's order.
    Queries have a scale per token, keys per block of 64 after their mean over all tokens is taken away, as in the
    kernels. The error of a row is its variance under the row's softmax over the keys that are looked at.
    """
    g, (batch, heads, _, dim) = geometry, q.shape
    scale = dim**-0.5 if scale is None else scale
    device, group = q.device, heads // k.shape[1]
    rotation = _rotation(dim, device)
    rows, places = _looked_at(g, device)
    source = tables.long() + g.prefix
    head = torch.arange(heads, device=device)[:, None]
    result = torch.zeros(heads, len(CASES), device=device)
    levels = LEVELS["int8"]
    for b in range(batch):
        queries = q[b][head, source[:, rows]].float()
        keys = k[b][head // group, source[:, places]].float()
        mean = k[b].mean(1, dtype=torch.float32).repeat_interleave(group, 0)[:, None]
        exact = queries @ (keys - mean).transpose(1, 2) * scale
        weights = exact.softmax(2)
        # The cases of `CASES`, all at once: launches take the time.
        a = torch.stack([queries, queries @ rotation, queries])
        c = torch.stack([keys - mean, (keys - mean) @ rotation, keys])
        product = fake_quantize(a, levels, -1) @ fake_quantize_blocks(c, levels, g.block_k).transpose(2, 3) * scale
        wrong = product - exact
        constant = (weights * wrong).sum(3, keepdim=True)
        result += (weights * (wrong - constant).square()).sum(3).mean(2).T / batch
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


def root_means(sums: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[list[float]]:
    """Errors of sites, one per case, from each one's sums `[H, 3]` over `weight [H]` observations: the root of the mean
    over heads. Waits for the device once."""
    if not sums:
        return []
    found = [(errors / weight[:, None]).mean(0).to(sums[0][0].device) for errors, weight in sums]
    return torch.stack(found).sqrt().tolist()


def rotates(errors: Sequence[float]) -> bool:
    """Whether a site with these `root_means` should be rotated."""
    return errors[PLAIN] > FLOOR and errors[PLAIN] >= MARGIN * errors[ROTATED]
