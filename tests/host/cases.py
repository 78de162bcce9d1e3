"""Tables of tiny models: what the host's config class, the latent and the conditioning are, and what PARO must say.

Latent sizes are odd wherever the host can pad.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# What the host is booted on: a process has one host, and that has one device.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Kernels where there is a GPU; the interpreter would take minutes for each test.
BACKEND = "triton" if DEVICE == "cuda" else "reference"
TEXT = 7
WIDTH = 64


@dataclass(frozen=True)
class Run:
    """One latent (several shapes make a packed one), the layout expected, more conditioning, sites where they differ
    from the case's, the oldest host version it was seen to run on where that is not every one, and how many at once
    the host itself can do of it."""

    shape: tuple
    layout: str
    extra: Callable[[], dict[str, Any]] = dict
    sites: int | None = None
    since: tuple[int, int, int] = (0, 0, 0)
    batch: int = 2


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


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of what is expected."""
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def describe(report: Any) -> str:
    """The report's layout as cases give it."""
    return f"{report.prefix} + {'x'.join(map(str, report.grid))} + {report.suffix}"


def check(report: Any, case: Case, run: Run, dense_steps: int, steps: int = 2) -> None:
    """Every intended site went sparse in every step after the dense ones, and nothing else was asked for."""
    sites = run.sites or case.sites
    assert report.family == case.family
    assert describe(report) == run.layout
    assert (report.sites, report.sites_sparse) == (sites, sites), report.text()
    assert set(report.calls) == ({"sparse", "dense step"} if dense_steps else {"sparse"})
    assert report.calls["sparse"] * dense_steps == report.calls.get("dense step", 0) * (steps - dense_steps)
    assert report.calls["sparse"] % sites == 0
    assert not report.passed and not report.fallbacks and not report.notes, report.text()


def noise(*shape: int) -> torch.Tensor:
    """The same normal values every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
