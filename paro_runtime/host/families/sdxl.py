"""SDXL: a U-Net, whose self-attention runs on the latent halved once, twice and so on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import Family, ModelCall, class_path, not_an_image, patches

SDXL_TEXT_WIDTH = 2048
"""Two text encoders side by side; the other U-Nets of the same class have another width."""


class SDXL(Family):
    """One stream per level that has attention: the level's grid, no text among the tokens."""

    name = "sdxl"
    classes = ("comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel",)

    def refusal(self, model: Any) -> str | None:
        if _text_width(model) != SDXL_TEXT_WIDTH:
            return "of the U-Nets only SDXL is supported: the others' self-attention is too short to gain"
        return None

    def layout(self, model: Any, call: ModelCall) -> tuple[TokenLayout, ...] | str:
        if len(call.shape) != 4:
            return not_an_image("SDXL", call.shape)
        levels = {level for level, _ in _transformers(model)}
        h, w = call.shape[2:]
        layouts = []
        for level in range(max(levels, default=-1) + 1):
            if level in levels:
                layouts.append(TokenLayout(0, (1, h, w)))
            h, w = patches(h, 2), patches(w, 2)
        return tuple(layouts) or "SDXL: the model has no self-attention"

    def key(self, options: Mapping[str, Any]) -> tuple[str, int] | None:
        block, index = options.get("block"), options.get("block_index")
        return None if block is None or index is None else (f"{block[0]}{block[1]}", int(index))


def _transformers(model: Any) -> Iterator[tuple[int, Any]]:
    """The transformers on the way down and in the middle, each with how often the latent is halved before it."""
    level = 0
    for block in (*model.input_blocks, model.middle_block):
        for layer in block:
            name = class_path(layer).rpartition(".")[2]
            level += name == "Downsample"
            if name == "SpatialTransformer":
                yield level, layer


def _text_width(model: Any) -> int | None:
    first = next((transformer for _, transformer in _transformers(model)), None)
    return None if first is None else first.transformer_blocks[0].attn2.to_k.weight.shape[1]


FAMILY = SDXL()
