"""Tables of tiny models: what the host's config class, the latent and the conditioning are, and what PARO must say.

Latent sizes are odd wherever the host can pad.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TEXT = 7
WIDTH = 64


@dataclass(frozen=True)
class Run:
    """One latent (several shapes make a packed one), the layout expected, more conditioning, sites where they differ
    from the case's, and the oldest host version it was seen to run on where that is not every one."""

    shape: tuple
    layout: str
    extra: Callable[[], dict[str, Any]] = dict
    sites: int | None = None
    since: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Case:
    """One architecture. sites: self-attention calls of one evaluation that PARO is to take.

    config   class in the host's `supported_models`; a host without it does not know the architecture.
    always   conditioning that the model needs in both prompts.
    prepare  changes the built model, such as leaving out fixed-size parts that are not used here.
    """

    name: str
    family: str
    config: str
    unet: dict[str, Any]
    runs: tuple[Run, ...]
    sites: int
    text: tuple[int, int] = (TEXT, WIDTH)
    pooled: int = WIDTH
    cfg: float = 2.0
    always: Callable[[], dict[str, Any]] = dict
    prepare: Callable[[Any], None] | None = None
    device: str = "cpu"


def noise(*shape: int) -> torch.Tensor:
    """The same normal values every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
