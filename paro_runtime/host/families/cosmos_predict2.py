"""Cosmos-Predict2 and Anima: no text among the tokens; blocks are named since ComfyUI 0.29."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import CountedFamily, ModelCall, grid_of, not_a_video

AMBIGUOUS = "the text is as long as the video: self- and cross-attention cannot be told apart"


class CosmosPredict2(CountedFamily):
    """Sequence: grid; self-attention first in every block."""

    name = "cosmos_predict2"
    classes = ("comfy.ldm.cosmos.predict2.MiniTrainDIT", "comfy.ldm.anima.model.Anima")

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 5:
            return not_a_video("Cosmos-Predict2", call.shape)
        layout = TokenLayout(0, grid_of(call.shape, (model.patch_temporal, model.patch_spatial, model.patch_spatial)))
        return AMBIGUOUS if layout.length == call.text_tokens else layout

    def counts(self, model: Any) -> tuple[int, ...]:
        return (len(model.blocks),)


FAMILY = CosmosPredict2()
