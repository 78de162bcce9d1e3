"""What a run tells its user: one line, a text, a picture, and the same as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..plan.plan import Plan
from .facts import Facts
from .picture import plan_picture
from .text import report_text
from .verdict import status, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...kernels.core.layout import TokenLayout
    from ..run.grid_run import GridRun
    from ..run.policy import Policy
    from ..run.run_log import RunLog
    from ..run.schedule import Schedule


@dataclass(frozen=True)
class Report:
    """Figures of one run. Times are wall-clock seconds, medians per step; `fallbacks`, `passed` are (reason, count).

    dense_steps: those in which no call was sparse, of the `steps` that happened or, where other nodes skip some, were
    asked for. why_dense: where there are more of them than in a usual run, or no others.
    attention_error: relative L2 of sparse attention against exact one, on up to MOST_ROWS rows in the steps that
    measure the tail's bias: of all together, and of the worst layer in one of those steps. None where it was not
    measured.
    density and mass_kept are the plan's: means over its groups of sparse steps, of which `densities` has one each.
    """

    family: str
    tokens: int
    grid: tuple[int, int, int]
    prefix: int
    suffix: int
    steps: int
    dense_steps: int
    sites: int
    sites_sparse: int
    sites_dense_blocks: int
    sites_rotated: int
    sites_routed: int
    attention_error: tuple[float, float] | None
    density: float
    densities: list[float]
    mass_kept: float
    precision: str
    backend: str
    device: str
    plan_source: str
    orders_histogram: dict[str, int]
    calibration_seconds: float
    tail_seconds: float
    step_seconds: dict[str, float]
    calls: dict[str, int]
    fallbacks: list[tuple[str, int]]
    passed: list[tuple[str, int]]
    notes: list[str]
    why_dense: str = ""
    expected_gain: tuple[float, float] | None = None
    plan: Plan | None = field(default=None, repr=False, compare=False)
    facts: Facts = field(default_factory=Facts, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        policy: Policy,
        schedule: Schedule,
        log: RunLog,
        grids: Sequence[GridRun],
        *,
        calibrating: bool,
        attention_error: tuple[float, float] | None,
    ) -> Report:
        """Of a run that is over, about the largest of the grids, if there is one; calibrating: PARO Calibrate's run."""
        grid = max(grids, key=lambda one: one.layout.grid_tokens, default=None)
        plan = grid.plan if grid else None
        layout = grid.layout if grid else None
        counts = log.counts
        return cls(
            family=policy.identity.family,
            tokens=layout.length if layout else 0,
            grid=layout.grid if layout else (0, 0, 0),
            prefix=layout.prefix if layout else 0,
            suffix=layout.suffix if layout else 0,
            steps=max(schedule.steps, log.clock.happened),
            dense_steps=log.clock.dense,
            sites=len(log.sites),
            sites_sparse=len(log.sparse_sites),
            sites_dense_blocks=len(log.dense_block_sites),
            sites_rotated=sum(entry.rotate for entry in plan.sites.values()) if plan else 0,
            sites_routed=len(log.routed_sites),
            attention_error=attention_error,
            density=plan.density if plan else 1.0,
            densities=plan.densities if plan else [],
            mass_kept=plan.mass_kept if plan else 1.0,
            precision=log.precision,
            backend=log.backend or "none",
            device=log.device or "none",
            plan_source=grid.source if grid else "none",
            orders_histogram=plan.orders_histogram() if plan else {},
            calibration_seconds=log.seconds.calibration,
            tail_seconds=log.seconds.tail,
            step_seconds=log.clock.medians(),
            calls={"sparse": counts.sparse, **counts.dense},
            fallbacks=counts.fallbacks.most_common(),
            passed=counts.passed.most_common(),
            notes=list(log.notes),
            why_dense="" if calibrating or grid is None else _why_dense(schedule, log),
            expected_gain=_expected_gain(policy, log, layout, plan),
            plan=plan,
            facts=Facts.of(policy, schedule, log, grids, grid, calibrating=calibrating),
        )

    def as_dict(self) -> dict:
        """JSON-ready, for programs: without the plan, and without what only the texts need."""
        values = {key: value for key, value in self.__dict__.items() if key not in ("plan", "facts")}
        return {**values, "grid": list(self.grid), "fallbacks": [list(f) for f in self.fallbacks]}

    @property
    def gain(self) -> float | None:
        """How much faster a sparse step was than a dense one, or None when there was not one of each."""
        return self.facts.gain

    def verdict(self) -> str:
        """One sentence."""
        return verdict(self)

    def status(self) -> str:
        """One line for the node."""
        return status(self)

    def text(self) -> str:
        """Several lines, for people."""
        return report_text(self)

    def picture(self) -> torch.Tensor | None:
        """Token order and blocks kept of every head: float32 `[1, height, width, 3]` in 0..1; None without a plan."""
        return plan_picture(self.plan) if self.plan is not None else None


def _why_dense(schedule: Schedule, log: RunLog) -> str:
    happened = log.clock.dense
    if happened > schedule.dense_steps:
        reasons = [(count, reason) for reason, count in log.counts.dense.items() if reason != "dense step"]
        return max(reasons)[1] if reasons else ""
    if happened == schedule.dense_steps == schedule.steps:
        about = "about " * (schedule.whole > schedule.steps)
        return f"the first {schedule.dense_whole} of {about}{schedule.whole} are"
    return ""


def _expected_gain(
    policy: Policy, log: RunLog, layout: TokenLayout | None, plan: Plan | None
) -> tuple[float, float] | None:
    if plan is None or log.backend != "triton":
        return None
    return policy.recipe.expected_gain(layout, plan.density)
