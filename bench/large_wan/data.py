"""Batches of training data: fresh procedural clips and their prompts, the same for the same seed and device type."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import encode
from .scenes import draw_labels, draw_scenes, render
from .textures import Photos
from .words import contexts

CELL = 8  # pixels a side of a token: 2 x 2 latent cells of 4 x 4 pixels


@dataclass(frozen=True)
class Batch:
    """`video` `[B, T, 3, 8h, 8w]` in [-1, 1] and its labels, `scene` `[B, 3]` and `objects` `[B, 5, 4]`."""

    video: Tensor
    scene: Tensor
    objects: Tensor

    def latent(self) -> Tensor:
        """Latents `[B, 16, T, 2h, 2w]`."""
        return encode(self.video)

    def contexts(self) -> Tensor:
        """Prompts `[B, 7, 4096]`."""
        return contexts(self.scene, self.objects)


def make_batch(
    batch: int,
    grid: tuple[int, int, int],
    generator: torch.Generator,
    photos: Photos | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
) -> Batch:
    """Clips of the token grid (T, h, w), T frames of 8h x 8w pixels, on the generator's device.

    Without `labels` (scene, objects) they are drawn too.
    """
    photos = photos or Photos.none(generator.device)
    frames, height, width = grid[0], CELL * grid[1], CELL * grid[2]
    scene, objects = labels or draw_labels(batch, generator, photographs=len(photos.images) > 0)
    scenes = draw_scenes(scene, objects, width / height, generator)
    return Batch(render(scenes, frames, height, width, photos, generator), scene, objects)
