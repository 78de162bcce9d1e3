"""Recipes: what suits a model family, read from `calib_presets/*.json`, and the choices that follow from one."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from ..kernels.problem import BLOCK_K
from .settings import Settings

FOLDER = Path(__file__).resolve().parent.parent / "calib_presets"
# Above this many grid tokens queries are masked in rows of 128: the kernels' tiles are that tall, and with hundreds of
# blocks a side the finer mask no longer pays.
WIDE_QUERY_TOKENS = 8192


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
    dense_blocks: str
    min_tokens: int
    precision: str
    notes: str = ""


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


@dataclass(frozen=True)
class MaskOptions:
    """What shapes a plan's masks: two plans with equal options for one model and grid are interchangeable.

    pool: tokens per pooled key of the tail, or None to drop what is not kept.
    """

    density: float
    order: str
    budget: str
    pool: int | None

    def as_dict(self) -> dict:
        """Flat, for the plan's metadata."""
        return {"density": self.density, "order": self.order, "budget": self.budget, "pool": self.pool or 0}


def mask_options(settings: Settings, recipe: Recipe) -> MaskOptions:
    """Settings where the user chose, the recipe elsewhere."""
    density = settings.density if settings.density is not None else recipe.densities[settings.preset]
    pool = None if settings.tail == "off" else BLOCK_K
    return MaskOptions(float(density), settings.order, settings.budget, pool)


def query_block(grid_tokens: int) -> int:
    """Query rows per mask block for a grid of this size."""
    return 128 if grid_tokens > WIDE_QUERY_TOKENS else 64
