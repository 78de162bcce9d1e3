"""Background textures: procedural ones in several octaves, and crops of photographs. Square, colour, one per clip.

A texture covers the world from -1 to 1 in both directions, where the shorter side of the first frame is 1 long.
Channels are red, green, blue in [0, 1].
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import constant
from .words import BACKGROUNDS, COLOURS

RGB = {
    "red": (0.90, 0.15, 0.12),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.93, 0.88, 0.20),
    "green": (0.18, 0.70, 0.22),
    "cyan": (0.15, 0.78, 0.80),
    "blue": (0.15, 0.25, 0.90),
    "violet": (0.60, 0.20, 0.80),
    "white": (0.92, 0.92, 0.92),
}


def colours(device: torch.device) -> Tensor:
    """The colour words as `[8, 3]` fp32 in [0, 1]."""
    return constant(tuple(RGB[name] for name in COLOURS), device)


@dataclass(frozen=True)
class Photos:
    """Photographs as uint8 `[P, 3, S, S]` on the training device; P may be 0, and then no clip asks for one."""

    images: Tensor

    @classmethod
    def none(cls, device: torch.device | str = "cpu") -> "Photos":
        """No photographs."""
        return cls(torch.zeros(0, 3, 1, 1, dtype=torch.uint8, device=device))

    @classmethod
    def load(cls, folder: Path | None, device: torch.device | str, side: int = 512) -> "Photos":
        """All PNG and JPEG files of a folder, each its largest central square at `side` pixels. Needs Pillow.

        Raises FileNotFoundError if the folder holds none; None means no photographs.
        """
        if folder is None:
            return cls.none(device)
        import numpy as np
        from PIL import Image, ImageOps

        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not paths:
            raise FileNotFoundError(f"{folder}: no PNG or JPEG files")
        squares = [np.asarray(ImageOps.fit(Image.open(p).convert("RGB"), (side, side))) for p in paths]
        return cls(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous().to(device))

    def crops(self, batch: int, side: int, generator: torch.Generator) -> Tensor:
        """`[batch, 3, side, side]`: a random photograph each, mirrored or not, of which 60 to 100 % are seen."""
        device = self.images.device
        index = torch.randint(len(self.images), (batch,), generator=generator, device=device)
        zoom, mirror, x, y = torch.rand(4, batch, generator=generator, device=device)
        zoom = 0.6 + 0.4 * zoom
        mirror = torch.where(mirror < 0.5, -zoom, zoom)
        zero = torch.zeros_like(zoom)
        shift_x, shift_y = ((2 * t - 1) * (1 - zoom) for t in (x, y))
        rows = torch.stack([mirror, zero, shift_x, zero, zoom, shift_y], 1).view(batch, 2, 3)
        grid = F.affine_grid(rows, [batch, 3, side, side], align_corners=False)
        return F.grid_sample(self.images[index].float() / 255, grid, align_corners=False, padding_mode="reflection")


def noise(batch: int, side: int, falloff: float, generator: torch.Generator, channels: int = 1) -> Tensor:
    """Sum of octaves of smoothed random numbers, `[batch, channels, side, side]`, mean 0 and standard deviation 1.

    Octaves have 4, 8, 16, ... cells a side up to side / 2; each is `falloff` times as strong as the one before.
    """
    total = torch.zeros(batch, channels, side, side, device=generator.device)
    cells, strength = 4, 1.0
    while cells <= side // 2:
        coarse = torch.randn(batch, channels, cells, cells, generator=generator, device=generator.device)
        total += strength * F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
        cells, strength = 2 * cells, strength * falloff
    spread, mean = torch.std_mean(total, dim=(2, 3), keepdim=True)
    return (total - mean) / spread.clamp_min(1e-6)


def _bricks(x: Tensor, y: Tensor, size: Tensor, shade: Tensor) -> Tensor:
    """Courses of bricks twice as wide as high with mortar between; `shade` `[B, 64]` is each brick's own."""
    course = torch.floor(y / size)
    along = x / (2 * size) + 0.5 * torch.remainder(course, 2)
    inside = torch.remainder(along, 1), torch.remainder(y / size, 1)
    mortar = (inside[0] < 0.06) | (inside[1] < 0.12)
    number = torch.remainder(7 * course + 13 * torch.floor(along), 64).long()
    return torch.where(mortar, -1.5, shade.gather(1, number.flatten(1)).view(number.shape))


def draw_textures(kind: Tensor, tint: Tensor, side: int, photos: Photos, generator: torch.Generator) -> Tensor:
    """Textures `[B, 3, side, side]` in [0, 1] of kinds (index of BACKGROUNDS) and tints (index of COLOURS), `[B]`."""
    batch, device = len(kind), generator.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, 1, generator=generator, device=device)

    line = (torch.arange(side, device=device) + 0.5) * (2 / side) - 1
    y, x = line[None, :, None].expand(batch, -1, side), line[None, None, :].expand(batch, side, -1)
    soft, fine = (noise(batch, side, falloff, generator)[:, 0] for falloff in (0.5, 1.0))
    angle, phase, waves = uniform(0, 2 * math.pi), uniform(0, 2 * math.pi), uniform(12, 30)
    across = x * angle.cos() + y * angle.sin()
    shade = torch.randn(batch, 64, generator=generator, device=device) * 0.6
    fields = {
        "gradient": 1.2 * across + 0.15 * fine,
        "clouds": soft,
        "grain": 0.35 * soft + 0.8 * fine,
        "bricks": _bricks(x, y, uniform(0.08, 0.16), shade) + 0.25 * fine,
        "waves": 1.2 * torch.sin(waves * across + 2.5 * soft + phase) + 0.2 * fine,
    }
    field = torch.zeros_like(soft)
    for number, name in enumerate(BACKGROUNDS):
        if name in fields:
            field = torch.where(kind[:, None, None] == number, fields[name], field)
    base = colours(device)[tint][:, :, None, None]
    light = (0.42 + 0.17 * field)[:, None]
    drift = 0.05 * noise(batch, side, 0.5, generator, channels=3)
    texture = light * (0.35 + 0.9 * base) + drift
    if len(photos.images):
        pictures = photos.crops(batch, side, generator) * (0.55 + 0.45 * base)
        texture = torch.where((kind == BACKGROUNDS.index("photograph"))[:, None, None, None], pictures, texture)
    return texture.clamp(0, 1)
