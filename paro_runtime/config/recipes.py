"""Recipes: what suits a model family, read from `calib_presets/*.json`, and the choices that follow from one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from ...kernels.core.layout import BLOCK_K, TokenLayout
from ..plan.options import WIDE_QUERY_TOKENS, MaskOptions
from .settings import Settings

FOLDER = Path(__file__).resolve().parents[2] / "calib_presets"
# Least density of the presets on smaller grids, whose blocks are a larger part of the picture: with the density of
# large ones the worst clips of the tiny model fall to 25 dB (64 seeds, docs/method.md).
SMALL_GRID_DENSITIES = {"quality": 0.85, "balanced": 0.7, "fast": 0.55}
# Least dense steps of the presets there in schedules of few steps, as a share of the schedule: how things move is
# decided in the first steps, and with one of eight a clip of 64 moved otherwise, at any density.
SMALL_GRID_DENSE_SHARE = 0.25
# Quantising, pooling and reordering, as a share of dense attention.
PREPARING_COST = 0.05


class RecipeError(ValueError):
    """A recipe that does not exist or does not follow the schema."""


@dataclass(frozen=True)
class Recipe:
    """One file of `calib_presets/`; fields as in `schema.json`."""

    family: str
    title: str
    evidence: str
    densities: dict[str, float]
    dense_fraction: float
    few_steps: dict[str, int]
    dense_blocks: str
    min_tokens: int
    sparse_tokens: int
    attention_half: list[int]
    typical: dict[str, int]
    precision: str
    notes: str = ""

    def dense_steps(self, steps: int, small: bool = False) -> int:
        """First steps that keep every block: a share of a full schedule, a fixed number of a short one, of which small
        grids (`is_small`) have a quarter."""
        if steps <= self.few_steps["up_to"]:
            least = math.ceil(SMALL_GRID_DENSE_SHARE * steps) if small else 0
            return max(least, self.few_steps["dense_steps"])
        return default_dense_steps(steps, self.dense_fraction)

    def expected_gain(self, layout: TokenLayout, density: float) -> tuple[float, float]:
        """How much faster a sparse step may be than a dense one, from (careful) to (hopeful). Estimated from token
        counts, not measured: the first takes 16-bit weights and a kernel that gains by dropping blocks only, the second
        weights and a kernel that run at twice the speed."""
        kept = 1 - (layout.grid_tokens / layout.length) ** 2 * (1 - density)
        fast, slow = self.attention_half
        careful, hopeful = (layout.length / (layout.length + half) for half in (slow, fast))
        careful_cost = min(1.0, kept + PREPARING_COST)
        hopeful_cost = min(1.0, kept / 2 + PREPARING_COST)
        return 1 / (1 - careful * (1 - careful_cost)), 1 / (1 - hopeful * (1 - hopeful_cost))


@cache
def all_recipes() -> dict[str, Recipe]:
    """Every shipped recipe by family. Raises RecipeError naming the file that is wrong."""
    recipes = {}
    known = {field.name for field in fields(Recipe)}
    for path in sorted(FOLDER.glob("*.json")):
        if path.name == "schema.json":
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            recipes[content["family"]] = Recipe(**{k: v for k, v in content.items() if k in known})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RecipeError(f"recipe {path.name}: {error}") from None
    return recipes


def recipe_for(family: str) -> Recipe:
    """The family's recipe. Raises RecipeError listing what there is."""
    try:
        return all_recipes()[family]
    except KeyError:
        raise RecipeError(f"recipe: none for {family!r}; there are {', '.join(all_recipes())}") from None


def is_small(settings: Settings, grid_tokens: int) -> bool:
    """Whether a preset is on a grid where it keeps more than the recipe says; a density that the user gives is taken
    as it is."""
    return settings.density is None and grid_tokens <= WIDE_QUERY_TOKENS


def raised_density(settings: Settings, recipe: Recipe, grid_tokens: int) -> float | None:
    """The density of a preset on a grid of this size, where it is more than the recipe says; else None."""
    if not is_small(settings, grid_tokens):
        return None
    least = SMALL_GRID_DENSITIES.get(settings.preset, 0.0)
    return least if least > recipe.densities[settings.preset] else None


def mask_options(settings: Settings, recipe: Recipe) -> MaskOptions:
    """Settings where the user chose, the recipe elsewhere, for large grids; see `raised_density`."""
    density = settings.density if settings.density is not None else recipe.densities[settings.preset]
    pool = None if settings.tail == "off" else BLOCK_K
    target = float(settings.mass_target)
    steep = settings.dense_steps == 0 and settings.density_schedule == "falling"
    schedule = "steep" if steep else settings.density_schedule
    return MaskOptions(float(density), settings.order, settings.budget, pool, target, schedule)


def default_dense_steps(steps: int, fraction: float) -> int:
    """Steps kept dense when the user leaves it open: a share of the schedule, at least one.

    Few-step schedules (4 to 8 steps) cannot afford a percentage, so rounding is to the nearest whole step.
    """
    return max(1, math.floor(steps * fraction + 0.5))
