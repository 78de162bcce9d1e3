"""Flux 1 (dev, schnell, Fill, Kontext, Krea): text in front, Kontext references behind the image."""

from __future__ import annotations

from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import Family, ModelCall, class_path, grid_of, not_an_image, tokens_of


class Flux(Family):
    """Sequence: text + image grid + [reference images]; one joint attention in every double and single block."""

    name = "flux"
    title = "Flux"

    def recognise(self, model: Any) -> bool:
        return class_path(model) == "comfy.ldm.flux.model.Flux" and not _is_flux2(model)

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 4:
            return not_an_image(self.title, call.shape)
        if call.text is None:
            return f"{self.title}: no text conditioning"
        patch = (model.patch_size, model.patch_size)
        references = tokens_of(call.extra.get("ref_latents"), patch)
        return TokenLayout(call.text_tokens, grid_of(call.shape, patch), references)


class Flux2(Flux):
    """The same sequence; text is padded to 512 tokens in front, where the host counts it as text."""

    name = "flux2"
    title = "Flux 2"

    def recognise(self, model: Any) -> bool:
        return class_path(model) == "comfy.ldm.flux.model.Flux" and _is_flux2(model)


def _is_flux2(model: Any) -> bool:
    """The host runs both in one class; Flux 2 shares one modulation over all blocks, which Flux 1 does not."""
    return bool(getattr(model.params, "global_modulation", False))


FAMILY = Flux()
