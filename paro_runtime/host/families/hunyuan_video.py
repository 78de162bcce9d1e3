"""HunyuanVideo 1.0 and 1.5 (SkyReels too) and Hunyuan Image 2.1: one class, text in front of the grid."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import Family, ModelCall, grid_of, tokens_of


class HunyuanVideo(Family):
    """Sequence: [vision] + text + [glyphs] + [reference] + grid. The text's refiner runs before any block is named."""

    name = "hunyuan_video"
    classes = ("comfy.ldm.hunyuan_video.model.HunyuanVideo",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        patch = tuple(model.patch_size)
        if len(call.shape) != 2 + len(patch):
            return f"HunyuanVideo: the latent {list(call.shape)} does not fit the model's patch {list(patch)}"
        glyphs = call.extra.get("txt_byt5") if getattr(model, "byt5_in", None) is not None else None
        front = [call.extra.get("clip_fea"), glyphs]
        prefix = call.text_tokens + sum(tokens.shape[1] for tokens in front if tokens is not None)
        reference = call.extra.get("ref_latent")
        prefix += tokens_of(None if reference is None else [reference], patch)
        return TokenLayout(prefix, grid_of(call.shape, patch))


FAMILY = HunyuanVideo()
