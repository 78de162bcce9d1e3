"""Wan VACE: beside the main blocks run control blocks, each over a sequence as long as the video's."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from ...plan.plan import Site
from .base import NO_BLOCK_KEYS, Family, ModelCall, Place, grid_of, not_a_video

CALLS_PER_BLOCK = 2


class WanVace(Family):
    """Sequence: video grid. A control block runs under the number of the main block it follows, once per control."""

    name = "wan_vace"
    classes = ("comfy.ldm.wan.model.VaceWanModel",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 5:
            return not_a_video("Wan VACE", call.shape)
        return TokenLayout(0, grid_of(call.shape, model.patch_size))

    def site(self, place: Place) -> Site | str:
        key = self.key(place.options)
        if key is None:
            return NO_BLOCK_KEYS
        # Every block makes two calls: self-attention, then cross-attention to the text, however long that is.
        block, call = divmod(place.position, CALLS_PER_BLOCK)
        if call:
            return "cross-attention to a text as long as the video"
        return Site(key[0], key[1]) if block == 0 else Site("vace", key[1], block - 1)


FAMILY = WanVace()
