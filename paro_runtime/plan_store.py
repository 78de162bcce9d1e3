"""The folder of plans, under the name by which scripts of users import it; it is in `plan/store.py`."""

from .plan.store import FoundPlan, PlanStore

__all__ = ["FoundPlan", "PlanStore"]
