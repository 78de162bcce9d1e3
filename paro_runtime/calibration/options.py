"""How sites are observed, and how masks are made of what was observed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...kernels.core.layout import TokenLayout
from ...kernels.core.pattern import MOST_EXPANSIONS
from ..plan.options import MaskOptions
from ..plan.orders import ORIGINAL, candidate_orders, tiled_orders

# Grids of more tokens are large: what is looked at there is sampled more sparsely.
SHARED_TOKENS = 8192


def is_large(grid_tokens: int) -> bool:
    """Whether a grid is observed as large ones are."""
    return grid_tokens > SHARED_TOKENS


@dataclass(frozen=True)
class StatisticsOptions:
    """How sites are observed.

    density: at which orders are compared. order: `mass`, `paper` or `original`. tiles: offer tiled orders to `mass`.
    pool: tokens per pooled key, None without a tail. expansions: of the pools (`kernels/pooling/reference.py`).
    curves: try biases on sampled rows, for a plan whose first run does not measure them under its masks anyway.
    by_mass: masks will be chosen by mass: block sums of every row or, on large grids, of mean queries, even where the
    tail's sampled rows would tell them; on large grids no errors of single blocks then. sampled: on large grids, block
    sums of some blocks only (`budget_blocks`), since runs measure their masks themselves.
    """

    density: float
    order: str = "mass"
    pool: int | None = 64
    expansions: int = MOST_EXPANSIONS
    tiles: bool = True
    by_mass: bool = False
    curves: bool = True
    sampled: bool = False

    def candidates(self, grid: tuple[int, int, int]) -> tuple[str, ...]:
        """Names of the orders to compare on this grid, FHW first."""
        if self.order == "original":
            return (ORIGINAL,)
        return candidate_orders(grid) + (tiled_orders(grid) if self.tiles and self.order == "mass" else ())


@dataclass(frozen=True)
class Method:
    """How a plan follows from what was observed. The defaults are what measured best; the rest is for comparisons.

    criterion: blocks are kept by `error`, the squared output error, relative to the head's own output, that leaving
    them to the tail would cost, or by `mass`. `auto` is error, but mass where errors mislead, since they were measured
    in hardly anything but noise (docs/method.md): in plans made in passing from such a step, and in those for runs
    without a dense step. Without a tail or without values it is always mass.
    tiles: offer tiled orders. expansions: of the tail's pools.
    masks: kept in the `plan`, or measured in the `run` (`routing`); `auto`: in the run on large grids and in plans made
    in passing of little but noise, where criterion is auto.
    """

    criterion: str = "auto"
    tiles: bool = True
    expansions: int = MOST_EXPANSIONS
    masks: str = "auto"

    def in_passing(self, noisy: bool) -> Method:
        """This method for a plan that a run makes of one of its own steps; noisy: that begins with hardly anything but
        noise."""
        if not noisy or self.criterion != "auto":
            return self
        return replace(self, criterion="mass", masks="run" if self.masks == "auto" else self.masks)

    def routes(self, layout: TokenLayout) -> bool:
        """Whether the runs that a plan is for measure their masks themselves."""
        if self.masks != "auto":
            return self.masks == "run"
        return is_large(layout.grid_tokens) and self.criterion == "auto"

    @property
    def by_mass(self) -> bool:
        """Whether blocks are kept by their mass even where errors are known."""
        return self.criterion == "mass"

    def steep(self, options: MaskOptions) -> bool:
        """Whether masks serve from the first step on, which begins with nothing but noise."""
        return self.criterion == "auto" and options.density_schedule == "steep"

    def by_mass_alone(self, layout: TokenLayout) -> bool:
        """Whether errors of single blocks are not even kept, so that masses of every block are."""
        return self.by_mass or self.routes(layout)
