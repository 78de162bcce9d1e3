"""Flux 2 (dev, klein): Flux's class and sequence, with a recipe of its own."""

from .flux import Flux2

FAMILY = Flux2()
