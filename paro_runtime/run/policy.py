"""What one patched model is to do in every run."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.recipes import Recipe
from ..config.settings import Settings
from ..plan.plan import ModelIdentity, Plan
from ..plan.store import PlanStore


@dataclass(frozen=True)
class Policy:
    """What one patched model does: its identity, the recipe, the user's settings, a given plan, the plan folder.

    remember: plans that runs make on the way are saved there, and later runs of this model and size use them. Else only
    plans that were made on purpose are found, and what a run gives does not depend on the runs before it.
    """

    identity: ModelIdentity
    recipe: Recipe
    settings: Settings
    plan: Plan | None = None
    store: PlanStore | None = None
    remember: bool = False
