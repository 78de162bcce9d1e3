"""Quantisation in plain PyTorch: what the kernels' integer arithmetic computes, as fake-quantised floats.

Scales: Q per token, K per block of 64 keys after subtracting K's mean over all tokens (smooth-K, SageAttention,
arXiv 2410.02367: a constant vector taken from every key leaves the softmax unchanged), V per channel.
"""

from __future__ import annotations

import torch


def hadamard_matrix(size: int, device=None, dtype=torch.float32) -> torch.Tensor:
    """Orthonormal Hadamard matrix `[size, size]`: blocks of the largest power of two that divides size (Sylvester)."""
    power = size & -size
    h = torch.ones(1, 1, device=device, dtype=dtype)
    while h.shape[0] < power:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    h = h / power**0.5
    return h if power == size else torch.block_diag(*[h] * (size // power))


def fake_quantize(x: torch.Tensor, levels: int, dim: int | tuple[int, ...]) -> torch.Tensor:
    """Round x to `2*levels+1` symmetric steps with one scale per slice along `dim` (amax / levels)."""
    scale = x.abs().amax(dim=dim, keepdim=True).clamp_min(1e-12) / levels
    # The largest value is `levels` to within a rounding error, so nothing is beyond it after rounding.
    return (x / scale).round_().mul_(scale)


def fake_quantize_blocks(x: torch.Tensor, levels: int, block: int) -> torch.Tensor:
    """As `fake_quantize` with one scale per `block` rows of `x [..., L, D]` (the last block may be short)."""
    length = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -length % block))
    blocks = padded.unflatten(-2, (-1, block))
    return fake_quantize(blocks, levels, (-2, -1)).flatten(-3, -2)[..., :length, :]


LEVELS = {"int8": 127, "int4": 7}
