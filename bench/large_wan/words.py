"""The vocabulary of prompts and their embeddings: seven tokens that say what a clip shows and how it moves.

Token 0 names the camera's motion, token 1 the background's kind and tint, tokens 2 to 6 one object each (shape,
material, colour, motion), in no order that means anything: the model's cross-attention does not know a token's place.
A token is the sum of its words' embeddings; without words it is zero, as every token of the unconditional prompt is.
"""

import torch
from torch import Tensor

from .constants import constant

CAMERAS = ("fixed", "pan left", "pan right", "pan up", "pan down", "zoom in", "zoom out")
BACKGROUNDS = ("gradient", "clouds", "grain", "bricks", "waves", "photograph")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
MATERIALS = ("plain", "striped", "checkered", "dotted", "marbled")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "violet", "white")
MOTIONS = ("still", "left", "right", "up", "down", "turning")

KINDS = (CAMERAS, BACKGROUNDS, SHAPES, MATERIALS, COLOURS, MOTIONS)
WORDS = sum(len(kind) for kind in KINDS)
# Where each kind's words begin among all of them.
CAMERA_AT, BACKGROUND_AT, SHAPE_AT, MATERIAL_AT, COLOUR_AT, MOTION_AT = (
    sum(len(kind) for kind in KINDS[:i]) for i in range(len(KINDS))
)
MOST_OBJECTS = 5
TOKENS = 2 + MOST_OBJECTS
TEXT_DIM = 4096
# Word w is WORD_SIZE in dimension w of 4096 and 0 elsewhere: the first text layer is then a table of learned
# embeddings, and all of its columns beyond `WORDS` stay the zeros they began as.
WORD_SIZE = 8.0


def contexts(scene: Tensor, objects: Tensor) -> Tensor:
    """Prompts as text tokens `[B, 7, 4096]` fp32 on the labels' device.

    `scene` int64 `[B, 3]`: camera, background, tint (a colour). `objects` int64 `[B, 5, 4]`: shape, material, colour,
    motion; -1 throughout for an object that is not there.
    """
    begin = constant((CAMERA_AT, BACKGROUND_AT, COLOUR_AT), scene.device, torch.int64)
    camera, background, tint = (scene + begin).unbind(1)
    begin = constant((SHAPE_AT, MATERIAL_AT, COLOUR_AT, MOTION_AT), scene.device, torch.int64)
    there = (objects[..., :1] >= 0).float()
    tokens = torch.zeros(len(scene), TOKENS, TEXT_DIM, device=scene.device)
    tokens[:, 0].scatter_(1, camera[:, None], WORD_SIZE)
    tokens[:, 1].scatter_(1, torch.stack([background, tint], 1), WORD_SIZE)
    tokens[:, 2:].scatter_(2, (objects + begin).clamp_min(0), WORD_SIZE * there.expand(-1, -1, 4))
    return tokens


def describe(scene: Tensor, objects: Tensor) -> list[str]:
    """The prompts in English, of labels as `contexts` takes them."""
    lines = []
    for (camera, background, tint), things in zip(scene.tolist(), objects.tolist(), strict=True):
        named = [f"{COLOURS[c]} {MATERIALS[m]} {SHAPES[s]} ({MOTIONS[way]})" for s, m, c, way in things if s >= 0]
        lines.append(f"{CAMERAS[camera]}; {COLOURS[tint]} {BACKGROUNDS[background]}; {', '.join(named)}")
    return lines
