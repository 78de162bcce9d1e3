"""Stable Diffusion 3 and 3.5: text in front; 3.5 Medium has a second self-attention over the image alone."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import CountedFamily, ModelCall, grid_of, not_an_image


class StableDiffusion3(CountedFamily):
    """Two streams: text + image in every block, and the image alone in the first blocks of 3.5 Medium."""

    name = "sd3"
    classes = ("comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",)
    streams = ("joint", "image")

    def layout(self, model: Any, call: ModelCall) -> tuple[TokenLayout, ...] | str:
        if len(call.shape) != 4:
            return not_an_image("Stable Diffusion 3", call.shape)
        if call.text is None:
            return "Stable Diffusion 3: no text conditioning"
        grid = grid_of(call.shape, tuple(model.x_embedder.patch_size))
        joint = TokenLayout(call.text_tokens + model.register_length, grid)
        return (joint, TokenLayout(0, grid)) if _image_blocks(model) else (joint,)

    def counts(self, model: Any) -> tuple[int, ...]:
        return len(model.joint_blocks), _image_blocks(model)


def _image_blocks(model: Any) -> int:
    return sum(bool(block.x_block.x_block_self_attn) for block in model.joint_blocks)


FAMILY = StableDiffusion3()
