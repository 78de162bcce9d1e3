"""Qwen-Image 2.1: block-causal, so only the image's own queries see everything; text and references are fixed.

Written from the source of ComfyUI 0.38; not yet run, because that version was not at hand.
"""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import Family, ModelCall, grid_of, not_an_image, tokens_of


class QwenImage21(Family):
    """Keys: text with references in between + image. Queries of one call: the image's.

    Text and reference blocks attend to what lies before them, in calls of their own, or come from a cache.
    """

    name = "qwen_image21"
    classes = ("comfy.ldm.qwen_image21.model.QwenImage21Transformer2DModel",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 4:
            return not_an_image("Qwen-Image 2.1", call.shape)
        references = tokens_of(call.extra.get("ref_latents"), (1, 1))
        return TokenLayout(call.text_tokens + references, grid_of(call.shape, (1, 1)))

    def first_query(self, layout: TokenLayout) -> int:
        return layout.prefix


FAMILY = QwenImage21()
