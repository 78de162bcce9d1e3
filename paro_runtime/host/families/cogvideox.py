"""CogVideoX 1.0 and 1.5: text in front of the grid in every block."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import CountedFamily, ModelCall, grid_of, not_a_video


class CogVideoX(CountedFamily):
    """Sequence: text + grid; 1.5 also joins two latent frames into one token."""

    name = "cogvideox"
    classes = ("comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 5:
            return not_a_video("CogVideoX", call.shape)
        patch = (model.patch_size_t or 1, model.patch_size, model.patch_size)
        return TokenLayout(call.text_tokens, grid_of(call.shape, patch))

    def counts(self, model: Any) -> tuple[int, ...]:
        return (len(model.blocks),)


FAMILY = CogVideoX()
