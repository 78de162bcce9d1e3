"""HiDream-I1 and E1: three texts behind the image; E1's source image lies to the right of the image."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import CountedFamily, ModelCall, grid_of, not_an_image


class HiDream(CountedFamily):
    """Sequence: image (with the source image at its right) + T5 text + Llama text, the latter twice."""

    name = "hidream"
    classes = ("comfy.ldm.hidream.model.HiDreamImageTransformer2DModel",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 4:
            return not_an_image("HiDream", call.shape)
        llama = call.extra.get("encoder_hidden_states_llama3")
        if llama is None:
            return "HiDream: no Llama text conditioning"
        source = call.extra.get("image_cond")
        h, w = call.shape[2:]
        w += 0 if source is None else source.shape[-1]
        grid = grid_of((h, w), (model.patch_size, model.patch_size))
        return TokenLayout(0, grid, call.text_tokens + 2 * llama.shape[2])

    def counts(self, model: Any) -> tuple[int, ...]:
        return (len(model.double_stream_blocks) + len(model.single_stream_blocks),)


FAMILY = HiDream()
