"""Procedural clips: a camera that pans or zooms over a textured background, and textured objects that hide one another.

Lengths are in units of the frame's shorter side, x to the right and y down from the frame's centre, times in frames
from the middle of the clip. Everything is batched torch code on the generator's device.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tests.tiny_wan.data import signed_distance
from .constants import constant
from .textures import Photos, colours, draw_textures
from .words import BACKGROUNDS, CAMERAS, COLOURS, MATERIALS, MOST_OBJECTS, MOTIONS, SHAPES

# Directions (x, y) of the words; the camera moves over the world, so what it sees moves the other way.
PANS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0))
ZOOMS = (0, 0, 0, 0, 0, 1, -1)
WAYS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))


@dataclass(frozen=True)
class Scenes:
    """Parameters of B clips. Rows of objects are from the farthest to the nearest; those with label -1 are not there.

    `scene` int64 `[B, 3]` and `objects` int64 `[B, 5, 4]` are labels as in `words.contexts`; `pan` `[B, 2]` and `zoom`
    `[B]` per frame (zoom: of the magnification's logarithm); of each object `[B, 5]`: `centre` and `velocity` `[...,
    2]`, `radius`, `angle` and `spin` in radians (per frame), `colour` `[..., 3]`, `pattern` `[..., 2]` (frequency,
    phase).
    """

    scene: Tensor
    objects: Tensor
    pan: Tensor
    zoom: Tensor
    centre: Tensor
    velocity: Tensor
    radius: Tensor
    angle: Tensor
    spin: Tensor
    colour: Tensor
    pattern: Tensor


def draw_labels(batch: int, generator: torch.Generator, photographs: bool) -> tuple[Tensor, Tensor]:
    """Random labels, scene `[B, 3]` and objects `[B, 5, 4]`: 2 to 5 objects; photographs only where there are any."""
    device = generator.device

    def pick(words: tuple[str, ...] | int, *shape: int) -> Tensor:
        count = words if isinstance(words, int) else len(words)
        return torch.randint(count, (batch, *shape), generator=generator, device=device)

    kinds = len(BACKGROUNDS) - (not photographs)
    scene = torch.stack([pick(CAMERAS), pick(kinds), pick(COLOURS)], 1)
    objects = torch.stack([pick(words, MOST_OBJECTS) for words in (SHAPES, MATERIALS, COLOURS, MOTIONS)], 2)
    # The farthest are left out, so that a clip's objects are the nearest rows.
    missing = torch.arange(MOST_OBJECTS, device=device) < pick(MOST_OBJECTS - 1)[:, None]
    return scene, objects.masked_fill(missing[..., None], -1)


def draw_scenes(scene: Tensor, objects: Tensor, aspect: float, generator: torch.Generator) -> Scenes:
    """What the labels leave open, at random. `aspect` is width / height of the frame."""
    device, batch = generator.device, len(scene)
    reach = constant((max(aspect, 1.0), max(1 / aspect, 1.0)), device)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator, device=device)

    known, n = objects.clamp_min(0), MOST_OBJECTS
    turning = (known[..., 3] == MOTIONS.index("turning")).float()
    moving = ((known[..., 3] != MOTIONS.index("still")) & (turning == 0)).float()
    way = torch.where(uniform(0, 1, n) < 0.5, -1.0, 1.0)
    speed = uniform(0.015, 0.035, n)[..., None]
    colour = colours(device)[known[..., 2]] * uniform(0.85, 1.08, n)[..., None]
    return Scenes(
        scene=scene,
        objects=objects,
        pan=constant(PANS, device)[scene[:, 0]] * uniform(0.012, 0.024)[:, None],
        zoom=constant(ZOOMS, device)[scene[:, 0]] * uniform(0.015, 0.03),
        centre=uniform(-0.4, 0.4, n, 2) * reach,
        velocity=constant(WAYS, device)[known[..., 3]] * speed,
        radius=uniform(0.1, 0.2, n),
        angle=uniform(0, 2 * math.pi, n),
        spin=way * (turning * uniform(0.12, 0.25, n) + moving * uniform(0.0, 0.04, n)),
        colour=colour.clamp(0, 1),
        pattern=torch.stack([uniform(7, 11, n), uniform(0, 2 * math.pi, n)], 2),
    )


def _distance(shape: Tensor, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """Signed distance of each clip's shape (index of SHAPES) at `dx`, `dy` `[B, T, H, W]`; negative inside."""
    length = torch.sqrt(dx * dx + dy * dy)
    result = length - r
    for index in range(1, len(SHAPES)):
        if SHAPES[index] == "ring":
            other = (length - 0.7 * r).abs() - 0.3 * r
        elif SHAPES[index] == "bar":
            other = torch.maximum(dx.abs() - 1.3 * r, dy.abs() - 0.4 * r)
        else:
            other = signed_distance(index, dx, dy, r)
        result = torch.where(shape == index, other, result)
    return result


def _material(material: Tensor, u: Tensor, v: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    """Brightness in [-1, 1] of each clip's material (index of MATERIALS) at object coordinates `[B, T, H, W]`."""
    su, sv = torch.sin(frequency * u + phase), torch.sin(frequency * v + phase)
    patterns = {
        "striped": 3 * su,
        "checkered": 6 * su * sv,
        "dotted": 3 * (su + sv - 0.7),
        "marbled": torch.sin(0.6 * frequency * u + 2.2 * torch.sin(0.5 * frequency * v + phase) + 1.5 * sv),
    }
    result = torch.ones_like(u)
    for index, name in enumerate(MATERIALS):
        if name in patterns:
            result = torch.where(material == index, patterns[name], result)
    return result.clamp(-1, 1)


def render(scenes: Scenes, frames: int, height: int, width: int, photos: Photos, generator: torch.Generator) -> Tensor:
    """Videos `[B, frames, 3, height, width]` in [-1, 1]; the generator draws the backgrounds' textures."""
    device, batch, side = scenes.zoom.device, len(scenes.zoom), min(height, width)
    texture = draw_textures(scenes.scene[:, 1], scenes.scene[:, 2], 2 * side, photos, generator)
    t = torch.arange(frames, device=device) - (frames - 1) / 2
    y = ((torch.arange(height, device=device) + 0.5 - height / 2) / side)[:, None]
    x = (torch.arange(width, device=device) + 0.5 - width / 2) / side
    magnified = torch.exp(scenes.zoom[:, None] * t)[..., None, None]
    moved = scenes.pan[:, None] * t[:, None]
    world_x = x / magnified + moved[..., 0, None, None]
    world_y = y / magnified + moved[..., 1, None, None]
    world_x, world_y = torch.broadcast_tensors(world_x, world_y)
    where = torch.stack([world_x, world_y], -1).flatten(1, 2)
    video = F.grid_sample(texture, where, align_corners=False, padding_mode="reflection")
    video = video.view(batch, 3, frames, height, width)
    for row in range(MOST_OBJECTS):
        labels = scenes.objects[:, row, :, None, None, None]
        middle = scenes.centre[:, row, None] + scenes.velocity[:, row, None] * t[:, None]
        dx, dy = world_x - middle[..., 0, None, None], world_y - middle[..., 1, None, None]
        angle = (scenes.angle[:, row, None] + scenes.spin[:, row, None] * t)[..., None, None]
        u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
        r = scenes.radius[:, row, None, None, None]
        distance = _distance(labels[:, 0], u, v, r)
        cover = (0.5 - distance * side * magnified).clamp(0, 1) * (labels[:, 0] >= 0)
        frequency, phase = scenes.pattern[:, row, :, None, None, None].unbind(1)
        pattern = _material(labels[:, 1], u / r, v / r, frequency, phase)
        # Light falls from the upper left, and the rim is dark, so that objects stand out from what is behind them.
        light = (0.85 - 0.2 * (dx + dy) / r) * (0.45 + 0.55 * (-distance / (0.12 * r)).clamp(0, 1))
        shade = light * (0.625 + 0.375 * pattern)
        colour = scenes.colour[:, row, :, None, None, None] * shade[:, None]
        video = torch.lerp(video, colour.clamp(0, 1), cover[:, None])
    return (2 * video - 1).transpose(1, 2)
