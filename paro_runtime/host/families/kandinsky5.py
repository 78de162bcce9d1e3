"""Kandinsky 5 (video Lite and Pro, image): no text among the tokens; text blocks run before any block is named."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import Family, ModelCall, grid_of


class Kandinsky5(Family):
    """Sequence: grid; self-attention first in every block."""

    name = "kandinsky5"
    classes = ("comfy.ldm.kandinsky5.model.Kandinsky5",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        shape = call.shape if len(call.shape) == 5 else (*call.shape[:2], 1, *call.shape[2:])
        return TokenLayout(0, grid_of(shape, model.patch_size))


FAMILY = Kandinsky5()
