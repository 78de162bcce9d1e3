"""The latent: a fixed linear code of 16 numbers for each cell of 4 x 4 colour pixels.

A type-II discrete cosine transform (Ahmed, Natarajan, Rao 1974; orthonormal) over the colours (3 points), rows and
columns (4 points each) of a cell gives 48 coefficients, of which the 16 lowest stay: ten of the mean colour (i + j <=
3) and three of each colour difference (i + j <= 1). Each is divided by a fixed number, the root of its standard
deviation over the training clips, the brightness less its mean: halfway between equal weight for pixels and equal
weight for channels. There is no compression in time and nothing is trained.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import constant

CELL = 4
KEPT = tuple((0, i, j) for i in range(4) for j in range(4 - i)) + tuple(
    (c, i, j) for c in (1, 2) for i in range(2) for j in range(2 - i)
)
"""(colour, row, column) frequency of each of the 16 channels."""
# Of the coefficients over 512 procedural clips of 96 x 96 pixels (a unit test measures them again): standard
# deviations, and the mean of the first, which is the brightness. The other means are near zero.
SPREAD = (1.78, 0.47, 0.22, 0.12, 0.50, 0.24, 0.13, 0.25, 0.13, 0.155, 1.43, 0.22, 0.23, 0.97, 0.15, 0.15)
BRIGHTNESS = -2.4


def _cosines(points: int) -> Tensor:
    """Orthonormal DCT-II `[points, points]` fp64, one frequency a row."""
    k = torch.arange(points, dtype=torch.float64)
    rows = torch.cos(math.pi / points * torch.outer(k, k + 0.5)) * math.sqrt(2 / points)
    rows[0] /= math.sqrt(2)
    return rows


def _kernels() -> Tensor:
    colour, cell = _cosines(3), _cosines(CELL)
    return torch.stack([colour[c][:, None, None] * cell[i][:, None] * cell[j] for c, i, j in KEPT])


KERNELS = tuple(_kernels().flatten().tolist())


def basis(like: Tensor) -> Tensor:
    """Orthonormal kernels `[16, 3, 4, 4]` (channel, colour, row, column), on `like`'s device in its dtype."""
    return constant(KERNELS, like.device, like.dtype).view(len(KEPT), 3, CELL, CELL)


def _scale_and_mean(like: Tensor) -> tuple[Tensor, Tensor]:
    mean = (BRIGHTNESS,) + (0.0,) * (len(KEPT) - 1)
    scale, mean = (constant(values, like.device, like.dtype) for values in (SPREAD, mean))
    return scale.sqrt().view(1, -1, 1, 1, 1), mean.view(1, -1, 1, 1, 1)


def coefficients(video: Tensor) -> Tensor:
    """Video `[B, T, 3, 4H', 4W']` -> its kept coefficients `[B, 16, T, H', W']`, unscaled."""
    flat = F.conv2d(video.flatten(0, 1), basis(video), stride=CELL)
    return flat.unflatten(0, video.shape[:2]).transpose(1, 2)


def encode(video: Tensor) -> Tensor:
    """Video `[B, T, 3, 4H', 4W']` in [-1, 1] -> latent `[B, 16, T, H', W']`."""
    scale, mean = _scale_and_mean(video)
    return (coefficients(video) - mean) / scale


def decode(latent: Tensor) -> Tensor:
    """Latent `[B, 16, T, H', W']` -> video `[B, T, 3, 4H', 4W']` in [-1, 1]: the closest with these channels."""
    scale, mean = _scale_and_mean(latent)
    flat = (latent * scale + mean).transpose(1, 2)
    video = F.conv_transpose2d(flat.flatten(0, 1), basis(latent), stride=CELL)
    return video.unflatten(0, flat.shape[:2]).clamp(-1, 1)
