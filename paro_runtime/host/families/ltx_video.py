"""LTX-Video 0.9 and 13B, LTX-2, 2.3 and 2.5 (with audio): the video's self-attention; audio and text are untouched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import CountedFamily, ModelCall, not_a_video


class LTXVideo(CountedFamily):
    """Sequence: video grid + [guide frames]; patches of one latent cell.

    Of LTX-2's six calls per block only the video's self-attention has this length on both sides.
    """

    name = "ltx_video"
    classes = ("comfy.ldm.lightricks.model.LTXVModel", "comfy.ldm.lightricks.av_model.LTXAVModel")
    streams = ("video",)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.visual) != 5:
            return not_a_video("LTX", call.visual)
        f, h, w = call.visual[2:]
        layout = _with_guides(call, (f, h, w))
        if isinstance(layout, str):
            return layout
        others = {call.text_tokens: "text", _audio_tokens(call): "audio"}
        if layout.length in others:
            return f"LTX: as many {others[layout.length]} tokens as video tokens, which cannot be told apart"
        return layout

    def counts(self, model: Any) -> tuple[int, ...]:
        return (len(model.transformer_blocks),)

    def uncountable(self, call: ModelCall) -> str | None:
        if call.options.get("stg_self_attn_blocks"):
            return "LTX: spatio-temporal guidance skips blocks in this evaluation"
        return super().uncountable(call)


def _with_guides(call: ModelCall, grid: tuple[int, int, int]) -> TokenLayout | str:
    """Guide frames are appended to the latent; those that a mask takes out are not run."""
    f, h, w = grid
    guides = call.extra.get("keyframe_idxs")
    guide_tokens = 0 if guides is None else guides.shape[2]
    if guide_tokens == 0:
        return TokenLayout(0, grid)
    frames, rest = divmod(guide_tokens, h * w)
    if rest or frames >= f:
        return f"LTX: {guide_tokens} guide tokens are not whole frames of a {f}x{h}x{w} latent"
    mask = call.extra.get("denoise_mask")
    if mask is not None:
        gone = (mask[0] < 0).any(0).expand(grid).sum((1, 2)).tolist()
        if any(gone[: f - frames]):
            return "LTX: a mask takes tokens out of the video itself"
        guide_tokens -= sum(gone)
    return TokenLayout(0, (f - frames, h, w), guide_tokens)


def _audio_tokens(call: ModelCall) -> int:
    """Tokens of the audio stream: one per audio latent frame, after reference audio if there is any."""
    packed: Sequence[Sequence[int]] = call.extra.get("latent_shapes") or ()
    if len(packed) < 2:
        return 0
    reference = call.extra.get("ref_audio")
    return packed[1][2] + (0 if reference is None else reference["tokens"].shape[1])


FAMILY = LTXVideo()
