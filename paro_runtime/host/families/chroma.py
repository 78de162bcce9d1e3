"""Chroma and Chroma Radiance: Flux's sequence without references; padded text comes with a key mask."""

from __future__ import annotations

from .flux import Flux


class Chroma(Flux):
    """Sequence: text + image grid. Radiance works on pixels in patches of 16, Chroma on latents in patches of 2."""

    name = "chroma"
    title = "Chroma"
    classes = ("comfy.ldm.chroma.model.Chroma", "comfy.ldm.chroma_radiance.model.ChromaRadiance")

    def recognise(self, model: object) -> bool:
        return super(Flux, self).recognise(model)


FAMILY = Chroma()
