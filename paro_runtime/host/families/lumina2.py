"""Lumina 2 and Z-Image: text in front; Z-Image pads text and image, each to a multiple of 32 tokens."""

from __future__ import annotations

import math
from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import Family, ModelCall, grid_of, not_an_image, patches


class Lumina2(Family):
    """Sequence: text + [reference texts] + [reference features] + [reference images] + image, each padded.

    The refiners of text and image run before any block is named.
    """

    name = "lumina2"
    classes = ("comfy.ldm.lumina.model.NextDiT", "comfy.ldm.lumina.model.NextDiTPixelSpace")

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 4:
            return not_an_image("Lumina 2", call.shape)
        patch = (model.patch_size, model.patch_size)
        multiple = model.pad_tokens_multiple or 1
        grid = grid_of(call.shape, patch)
        tokens = math.prod(grid)
        prefix = _padded(call.text_tokens, multiple)
        references = call.extra.get("ref_latents") or ()
        if references:
            prefix += _reference_tokens(model, call, references, patch, multiple)
        return TokenLayout(prefix, grid, _padded(tokens, multiple) - tokens)


def _padded(tokens: int, multiple: int) -> int:
    return patches(tokens, multiple) * multiple


def _reference_tokens(model: Any, call: ModelCall, references: Any, patch: tuple[int, int], multiple: int) -> int:
    """Tokens in front that come with reference images: their texts, image features and the images themselves."""
    texts = call.extra.get("ref_contexts") or ()
    tokens = sum(_padded(text.shape[1], multiple) for text in texts)
    # A reference without a text of its own gets one block of padding in its place.
    tokens += multiple * max(0, len(references) - len(texts))
    tokens += sum(_padded(math.prod(grid_of(r.shape, patch)), multiple) for r in references)
    if getattr(model, "siglip_embedder", None) is None:
        return tokens
    features = list(call.extra.get("siglip_feats") or ())[: len(references)]
    tokens += sum(_padded(f.shape[1] * f.shape[2], multiple) for f in features)
    return tokens + multiple * (len(references) + 1 - len(features))


FAMILY = Lumina2()
