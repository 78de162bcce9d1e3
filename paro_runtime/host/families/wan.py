"""Wan 2.1 and 2.2, text-to-video and image-to-video (also first-last-frame, Fun control, TI2V-5B: the same class)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...plan import Site
from ...tokens import TokenLayout
from .base import NO_BLOCK_KEYS, ModelCall, block_key, class_path, patches

_PACKAGE = "comfy.ldm.wan."
_SUPPORTED = "comfy.ldm.wan.model.WanModel"


class Wan:
    """Sequence: [reference frame] + video grid + [in-context clips]; self-attention first in every block."""

    name = "wan"

    def recognise(self, model: Any) -> bool:
        return class_path(model).startswith(_PACKAGE)

    def refusal(self, model: Any) -> str | None:
        path = class_path(model)
        return None if path == _SUPPORTED else f"the Wan variant {path.rpartition('.')[2]} is not supported yet"

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 5:
            return f"Wan: expected a video latent [B, C, F, H, W], got {list(call.shape)}"
        f, h, w = (patches(n, p) for n, p in zip(call.shape[2:], model.patch_size, strict=True))
        joined = call.extra.get("time_dim_concat")
        if joined is not None:
            if tuple(joined.shape[3:]) != tuple(call.shape[3:]):
                return "Wan: frames of another size are joined to the video"
            f += patches(joined.shape[2], model.patch_size[0])
        return TokenLayout(self._reference_tokens(model, call), (f, h, w), self._context_tokens(model, call))

    def site(self, options: Mapping[str, Any], earlier: int) -> Site | str:
        key = block_key(options)
        if key is None:
            return NO_BLOCK_KEYS
        if earlier:
            # Cross-attention has the same keys, and as many text tokens as a small video has tokens looks like self.
            return "a second attention of the same length in one block"
        return Site(*key)

    @staticmethod
    def _reference_tokens(model: Any, call: ModelCall) -> int:
        """Fun models put one reference frame, patched in two dimensions and without padding, in front."""
        reference = call.extra.get("reference_latent")
        if reference is None or getattr(model, "ref_conv", None) is None:
            return 0
        return math.prod(n // p for n, p in zip(reference.shape[-2:], model.patch_size[1:], strict=True))

    @staticmethod
    def _context_tokens(model: Any, call: ModelCall) -> int:
        """In-context clips stand behind the video, each with a grid of its own."""
        clips = call.extra.get("context_latents") or ()
        return sum(
            math.prod(patches(n, p) for n, p in zip(clip.shape[-3:], model.patch_size, strict=True)) for clip in clips
        )


FAMILY = Wan()
