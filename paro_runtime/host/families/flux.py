"""Flux 1 (dev, schnell, Fill, Kontext, Krea): text in front, Kontext references behind the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...plan import Site
from ...tokens import TokenLayout
from .base import NO_BLOCK_KEYS, ModelCall, block_key, class_path, patches


class Flux:
    """Sequence: text + image grid + [reference images]; one joint attention in every double and single block."""

    name = "flux"

    def recognise(self, model: Any) -> bool:
        return class_path(model) == "comfy.ldm.flux.model.Flux"

    def refusal(self, model: Any) -> str | None:
        # The host runs Flux 2 in the same class; it shares one modulation over all blocks, which Flux 1 does not.
        if getattr(model.params, "global_modulation", False):
            return "Flux 2 is not supported yet"
        return None

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 4:
            return f"Flux: expected an image latent [B, C, H, W], got {list(call.shape)}"
        if call.text is None:
            return "Flux: no text conditioning"
        grid = (1, *(patches(n, model.patch_size) for n in call.shape[2:]))
        references = call.extra.get("ref_latents") or ()
        suffix = sum(
            patches(image.shape[-2], model.patch_size) * patches(image.shape[-1], model.patch_size)
            for image in references
        )
        return TokenLayout(call.text[1], grid, suffix)

    def site(self, options: Mapping[str, Any], earlier: int) -> Site | str:
        key = block_key(options)
        if key is None:
            return NO_BLOCK_KEYS
        return "a second attention of the same length in one block" if earlier else Site(*key)


FAMILY = Flux()
