"""Quantisation in plain PyTorch: what the kernels' integer arithmetic computes, as fake-quantised floats.

Scales: Q per token, K per block of 64 keys after subtracting K's mean over all tokens (smooth-K, SageAttention,
arXiv 2410.02367: a constant vector taken from every key leaves the softmax unchanged), V per channel.
"""

from __future__ import annotations

import torch

from .precision import Format


def hadamard_matrix(size: int, device=None, dtype=torch.float32) -> torch.Tensor:
    """Orthonormal Hadamard matrix `[size, size]`: blocks of the largest power of two that divides size (Sylvester)."""
    power = size & -size
    h = torch.ones(1, 1, device=device, dtype=dtype)
    while h.shape[0] < power:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    h = h / power**0.5
    return h if power == size else torch.block_diag(*[h] * (size // power))


def rounded_(x: torch.Tensor, to: Format) -> torch.Tensor:
    """The values that the format has nearest to x, which is scaled already and is overwritten."""
    return x.round_() if to.is_integer else x.to(to.storage).to(x.dtype)


def fake_quantize(x: torch.Tensor, to: Format, dim: int | tuple[int, ...]) -> torch.Tensor:
    """x rounded with one scale per slice along `dim` (largest magnitude / `to.largest`); as it is in 16 bits."""
    if not to.rounds:
        return x
    scale = x.abs().amax(dim=dim, keepdim=True).clamp_min(1e-12) / to.largest
    # The largest value is `to.largest` to within a rounding error, so nothing is beyond it after rounding.
    return rounded_(x / scale, to).mul_(scale)


def fake_quantize_blocks(x: torch.Tensor, to: Format, block: int) -> torch.Tensor:
    """As `fake_quantize` with one scale per `block` rows of `x [..., L, D]` (the last block may be short)."""
    length = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -length % block))
    blocks = padded.unflatten(-2, (-1, block))
    return fake_quantize(blocks, to, (-2, -1)).flatten(-3, -2)[..., :length, :]
