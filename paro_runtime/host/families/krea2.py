"""Krea 2: text in front, references behind the image; the host widens its few key heads before the call."""

from __future__ import annotations

import math
from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import Family, ModelCall, grid_of


class Krea2(Family):
    """Sequence: text + image + [references]. The text's fusion layers run before any block is named."""

    name = "krea2"
    classes = ("comfy.ldm.krea2.model.SingleStreamDiT",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) == 5 and call.shape[2] != 1:
            return "Krea 2: several frames run as a batch of images, which is not supported"
        patch = (model.patch, model.patch)
        references = 0
        if call.extra.get("ref_latents_method", getattr(model, "default_ref_method", None)) is not None:
            references = sum(math.prod(grid_of(r.shape, patch)) for r in call.extra.get("ref_latents") or ())
        return TokenLayout(call.text_tokens, grid_of(call.shape, patch), references)


FAMILY = Krea2()
