"""Image and latent metrics that need no trained weights."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [-1, 1] (clamped; peak 2). Infinite for equal inputs."""
    error = (video.clamp(-1, 1).double() - reference.clamp(-1, 1).double()).square().mean()
    return float("inf") if error == 0 else float(10 * torch.log10(4 / error))


def ssim(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity (Wang et al. 2004), mean over frames `[..., height, width]` of values in [-1, 1].

    Gaussian window of 11 x 11, sigma 1.5, constants (0.01 L)^2 and (0.03 L)^2 with L = 2.
    """
    x, y = (t.clamp(-1, 1).double().reshape(-1, 1, *t.shape[-2:]) for t in (video, reference))
    grid = torch.arange(11, dtype=torch.float64, device=x.device) - 5
    line = torch.exp(-grid.square() / (2 * 1.5**2))
    window = (line[:, None] * line[None]) / line.sum() ** 2

    def blur(t: torch.Tensor) -> torch.Tensor:
        return F.conv2d(t, window[None, None])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    value = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(value.mean())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine similarity of two tensors as flat vectors."""
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def flicker(video: torch.Tensor, reference: torch.Tensor) -> float:
    """How much more a video flickers than the one it is compared with: the mean absolute second difference in time
    over that of the reference; both `[frames, ...]`, values in [-1, 1] (clamped). 1: alike; above 1: it flickers more.

    Infinite where the reference does not change its pace at all and the video does. ValueError below three frames.
    """
    if min(video.shape[0], reference.shape[0]) < 3:
        raise ValueError(f"flicker: three frames are needed, got {video.shape[0]} and {reference.shape[0]}")
    ours, theirs = (t.clamp(-1, 1).double().diff(n=2, dim=0).abs().mean().item() for t in (video, reference))
    if theirs == 0:
        return 1.0 if ours == 0 else float("inf")
    return ours / theirs
