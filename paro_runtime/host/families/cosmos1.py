"""Cosmos 1.0 Diffusion (7B, 14B): no text among the tokens; blocks are not named."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import CountedFamily, ModelCall, grid_of, not_a_video


class Cosmos1(CountedFamily):
    """Sequence: video grid; self-attention first in every block."""

    name = "cosmos1"
    classes = ("comfy.ldm.cosmos.model.GeneralDIT",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 5:
            return not_a_video("Cosmos", call.shape)
        layout = TokenLayout(0, grid_of(call.shape, (model.patch_temporal, model.patch_spatial, model.patch_spatial)))
        if layout.length == call.text_tokens:
            return "Cosmos: the text is as long as the video: self- and cross-attention cannot be told apart"
        return layout

    def counts(self, model: Any) -> tuple[int, ...]:
        return (len(model.blocks),)


FAMILY = Cosmos1()
