"""Qwen-Image, Edit (references behind the image) and Layered (layers as frames)."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import Family, ModelCall, grid_of, tokens_of


class QwenImage(Family):
    """Sequence: text + image or layers + [references]; a key mask where the text is padded."""

    name = "qwen_image"
    classes = ("comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 5:
            return f"Qwen-Image: expected a latent [B, C, T, H, W], got {list(call.shape)}"
        patch = (1, model.patch_size, model.patch_size)
        references = tokens_of(call.extra.get("ref_latents"), patch)
        return TokenLayout(call.text_tokens, grid_of(call.shape, patch), references)


FAMILY = QwenImage()
