"""MiniMax H3: one packed sequence of text, references, audio and video; the video lies at its end."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import CountedFamily, ModelCall, grid_of


class MiniMaxH3(CountedFamily):
    """Sequence: text + [key frames or references] + audio + video grid. Blocks are named since ComfyUI 0.35."""

    name = "minimax_h3"
    classes = ("comfy.ldm.minimax.model.MiniMaxH3Model",)

    def refusal(self, model: Any) -> str | None:
        # Distilled with another sparse attention (VSA): dense attention, and so PARO's, is not what they learned.
        gates = (getattr(module, "to_gate_compress", None) for module in model.modules())
        if any(gate is not None for gate in gates):
            return "MiniMax H3 weights made for VSA (to_gate_compress) need VSA attention, not PARO"
        return None

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        packed = (call.extra.get("minimax_payload") or {}).get("layout")
        if packed is None or not call.extra.get("latent_shapes"):
            return "MiniMax H3: the host gives no packed layout"
        grid = grid_of(call.visual, model.patch_size)
        start, end, kind = packed.segments[-1]
        layout = TokenLayout(start, grid)
        if kind != "video" or end != layout.length:
            return f"MiniMax H3: expected a video of {layout.describe()} tokens at the end of the packed sequence"
        return layout

    def counts(self, model: Any) -> tuple[int, ...]:
        return (len(model.blocks),)


FAMILY = MiniMaxH3()
