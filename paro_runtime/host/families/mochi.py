"""Mochi: text behind the video, cut to the tokens that are not padding."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import CountedFamily, ModelCall, grid_of, not_a_video

TEXT_TOKENS = 256


class Mochi(CountedFamily):
    """Sequence: video grid + text."""

    name = "mochi"
    classes = ("comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 5:
            return not_a_video("Mochi", call.shape)
        text = min(call.text_tokens, int(call.extra.get("num_tokens", TEXT_TOKENS)))
        return TokenLayout(0, grid_of(call.shape, (1, model.patch_size, model.patch_size)), text)

    def counts(self, model: Any) -> tuple[int, ...]:
        return (len(model.blocks),)


FAMILY = Mochi()
