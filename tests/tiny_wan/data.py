"""Procedural training videos, their weightless latents, and the fixed text table.

A token grid (T, h, w) is a grey video of T frames of 8h x 8w pixels and a latent `[B, 16, T, 2h, 2w]`.
Everything is batched torch code on the device it is given, so a GPU renders training data faster than the
model can read it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = ("right-down", "left-down", "left-up", "right-up")
BACKGROUNDS = ("flat", "horizontal", "vertical", "checker")
LATENT_SCALE = 1.5
TEXT_DIM = 4096

# Per-channel mean and standard deviation of the Wan 2.1 VAE latents (Wan-Video/Wan2.1, Apache-2.0). ComfyUI's
# Wan21 latent format multiplies by the deviation and adds the mean on the sampler's way out.
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass
class Clips:
    """Parameters of a batch of clips; every tensor is `[B]` on one device, `labels` is int64 `[B, 3]`.

    `labels` holds (shape, direction, background). Lengths are pixels, speeds pixels per frame, phases
    radians; y points down. `velocity` is `[B, 2]` (x, y), `start` `[B, 2]` the object's centre in frame 0.
    """

    labels: Tensor
    level: Tensor
    amplitude: Tensor
    phase: Tensor
    period: Tensor
    radius: Tensor
    brightness: Tensor
    start: Tensor
    velocity: Tensor


def draw_clips(batch: int, height: int, width: int, generator: torch.Generator, labels: Tensor | None = None) -> Clips:
    """Draw clip parameters on the generator's device for frames of `height` x `width` pixels.

    The heading is 45 + 90 * direction + U(-30, 30) degrees. The object starts in the first 60 % of its free
    way along each axis, so that the direction label is what the first frames show; it bounces off the edges
    later.
    """
    device = generator.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator, device=device)

    if labels is None:
        labels = torch.randint(0, 4, (batch, 3), generator=generator, device=device)
    labels = labels.to(device)
    shorter = min(height, width)
    radius = shorter * uniform(0.12, 0.22)
    speed = shorter * uniform(0.03, 0.08)
    angle = torch.deg2rad(45 + 90 * labels[:, 1] + uniform(-30, 30))
    velocity = torch.stack([speed * angle.cos(), speed * angle.sin()], dim=1)
    side = torch.tensor([float(width), float(height)], device=device)
    way = (side - 2 * radius[:, None]) * torch.stack([uniform(0, 0.6), uniform(0, 0.6)], dim=1)
    start = torch.where(velocity > 0, radius[:, None] + way, side - radius[:, None] - way)
    return Clips(
        labels=labels,
        level=uniform(-0.6, 0.2),
        amplitude=uniform(0.15, 0.40),
        phase=uniform(0, 2 * math.pi),
        period=uniform(16, 40),
        radius=radius,
        brightness=uniform(0.6, 1.0),
        start=start,
        velocity=velocity,
    )


def positions(clips: Clips, frames: int, height: int, width: int) -> Tensor:
    """Object centres `[B, frames, 2]` (x, y) in pixels: straight, reflected one radius off the edges."""
    step = torch.arange(frames, device=clips.start.device, dtype=torch.float32)
    free = clips.start.new_tensor([float(width), float(height)]) - 2 * clips.radius[:, None]
    line = clips.start[:, None] + clips.velocity[:, None] * step[:, None] - clips.radius[:, None, None]
    folded = torch.remainder(line, 2 * free[:, None])
    return torch.minimum(folded, 2 * free[:, None] - folded) + clips.radius[:, None, None]


def signed_distance(shape: int, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """Signed distance (pixels, negative inside) of shape index 0..3 of radius `r` at offsets `dx`, `dy`."""
    if shape == 0:
        return torch.sqrt(dx * dx + dy * dy) - r
    if shape == 1:
        return torch.maximum(dx.abs(), dy.abs()) - 0.85 * r
    if shape == 2:
        return torch.maximum(0.866 * dx.abs() + 0.5 * dy, -dy) - 0.6 * r
    upright = torch.maximum(dx.abs() - 0.35 * r, dy.abs() - r)
    return torch.minimum(torch.maximum(dx.abs() - r, dy.abs() - 0.35 * r), upright)


def render(clips: Clips, frames: int, height: int, width: int) -> Tensor:
    """Render videos `[B, frames, height, width]` with values in [-1, 1]."""
    device = clips.level.device
    y = torch.arange(height, device=device, dtype=torch.float32)
    x = torch.arange(width, device=device, dtype=torch.float32)
    col = (slice(None), None)
    wave = 2 * math.pi / clips.period[col]
    sin_y = torch.sin(wave * y + clips.phase[col])[:, :, None]
    sin_x = torch.sin(wave * x + clips.phase[col])[:, None, :]
    kind = clips.labels[:, 2, None, None]
    pattern = torch.where(kind == 1, sin_y, torch.where(kind == 2, sin_x, sin_y * sin_x))
    pattern = torch.where(kind == 0, torch.zeros_like(pattern), pattern)
    background = (clips.level[:, None, None] + clips.amplitude[:, None, None] * pattern)[:, None]
    centre = positions(clips, frames, height, width)
    dx = x - centre[:, :, 0, None, None]
    dy = y[:, None] - centre[:, :, 1, None, None]
    r = clips.radius[:, None, None, None]
    shape = clips.labels[:, 0, None, None, None]
    dist = signed_distance(0, dx, dy, r)
    for index in (1, 2, 3):
        dist = torch.where(shape == index, signed_distance(index, dx, dy, r), dist)
    cover = (0.5 - dist).clamp(0, 1)
    return background * (1 - cover) + clips.brightness[:, None, None, None] * cover


def encode(video: Tensor) -> Tensor:
    """Video `[B, T, 4H', 4W']` in [-1, 1] -> latent `[B, 16, T, H', W']`: 4 x 4 space-to-depth, times 1.5.

    Channel = 4 * row + column inside the 4 x 4 cell. The map is invertible and has no weights.
    """
    batch, frames, height, width = video.shape
    cells = video.reshape(batch, frames, height // 4, 4, width // 4, 4)
    return cells.permute(0, 3, 5, 1, 2, 4).reshape(batch, 16, frames, height // 4, width // 4) * LATENT_SCALE


def decode(latent: Tensor) -> Tensor:
    """Inverse of `encode`, clamped to [-1, 1]: latent `[B, 16, T, H', W']` -> video `[B, T, 4H', 4W']`."""
    batch, _, frames, rows, cols = latent.shape
    cells = (latent / LATENT_SCALE).reshape(batch, 4, 4, frames, rows, cols)
    video = cells.permute(0, 3, 4, 1, 5, 2).reshape(batch, frames, rows * 4, cols * 4)
    return video.clamp(-1, 1)


def to_host_latent(latent: Tensor) -> Tensor:
    """What ComfyUI hands out after sampling: latent * std + mean per channel, `[B, 16, T, H', W']`."""
    mean, std = _wan21(latent)
    return latent * std + mean


def from_host_latent(latent: Tensor) -> Tensor:
    """Undo the Wan21 latent format: (latent - mean) / std per channel, ready for `decode`."""
    mean, std = _wan21(latent)
    return (latent - mean) / std


def _wan21(like: Tensor) -> tuple[Tensor, Tensor]:
    view = (1, 16, 1, 1, 1)
    return like.new_tensor(WAN21_MEAN).view(view), like.new_tensor(WAN21_STD).view(view)


@lru_cache(maxsize=1)
def text_table() -> Tensor:
    """The fixed vocabulary `[12, 4096]` fp32: 4 shapes, 4 directions, 4 backgrounds; normal * 0.3, seed 7.

    Drawn with NumPy's legacy generator, whose stream is frozen, so that the table is the same everywhere.
    """
    table = np.random.RandomState(7).standard_normal((12, TEXT_DIM)) * 0.3
    return torch.from_numpy(table.astype(np.float32))


def contexts(labels: Tensor) -> Tensor:
    """Label batch int `[B, 3]` -> text tokens `[B, 3, 4096]` (shape, direction, background) on the CPU."""
    return text_table()[labels.cpu() + torch.tensor([0, 4, 8])]


def context_for(shape: str | int, direction: str | int, background: str | int) -> Tensor:
    """Text tokens `[1, 3, 4096]` of one prompt, each word by name or index."""
    words = ((shape, SHAPES), (direction, DIRECTIONS), (background, BACKGROUNDS))
    indices = [names.index(word) if isinstance(word, str) else int(word) for word, names in words]
    return contexts(torch.tensor([indices]))


def null_context(batch: int = 1) -> Tensor:
    """The unconditional prompt of classifier-free guidance: zeros `[batch, 3, 4096]`."""
    return torch.zeros(batch, 3, TEXT_DIM)
