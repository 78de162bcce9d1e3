"""AuraFlow: register tokens and text in front of the image; heads of 256 channels."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import CountedFamily, ModelCall, grid_of, not_an_image


class AuraFlow(CountedFamily):
    """Sequence: registers + text + image in every block."""

    name = "auraflow"
    classes = ("comfy.ldm.aura.mmdit.MMDiT",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 4:
            return not_an_image("AuraFlow", call.shape)
        grid = grid_of(call.shape, (model.patch_size, model.patch_size))
        return TokenLayout(model.register_tokens.shape[1] + call.text_tokens, grid)

    def counts(self, model: Any) -> tuple[int, ...]:
        return (len(model.double_layers) + len(model.single_layers),)


FAMILY = AuraFlow()
