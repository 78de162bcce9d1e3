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
    from ...kernels.core.layout import TokenLayout
    from ..run.session import Grid, Session


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
    def of(cls, session: Session, grid: Grid | None) -> Report:
        """The session's report about its largest grid (None if no evaluation came)."""
        plan = grid.plan if grid else None
        layout = grid.layout if grid else None
        counts = session.counts
        return cls(
            family=session.policy.identity.family,
            tokens=layout.length if layout else 0,
            grid=layout.grid if layout else (0, 0, 0),
            prefix=layout.prefix if layout else 0,
            suffix=layout.suffix if layout else 0,
            steps=max(session.steps, session.clock.happened),
            dense_steps=session.clock.dense,
            sites=len(session.sites),
            sites_sparse=len(session.sparse_sites),
            sites_dense_blocks=len(session.dense_block_sites),
            sites_rotated=sum(entry.rotate for entry in plan.sites.values()) if plan else 0,
            sites_routed=len(session.routed_sites),
            attention_error=session.refresh.error if session.refresh is not None else None,
            density=plan.density if plan else 1.0,
            densities=plan.densities if plan else [],
            mass_kept=plan.mass_kept if plan else 1.0,
            precision=session.precision,
            backend=session.backend or "none",
            device=session.device or "none",
            plan_source=grid.source if grid else "none",
            orders_histogram=plan.orders_histogram() if plan else {},
            calibration_seconds=session.calibration_seconds,
            tail_seconds=session.tail_seconds,
            step_seconds=session.step_seconds,
            calls={"sparse": counts.sparse, **counts.dense},
            fallbacks=counts.fallbacks.most_common(),
            passed=counts.passed.most_common(),
            notes=list(session.notes),
            why_dense=_why_dense(session, grid),
            expected_gain=_expected_gain(session, layout, plan),
            plan=plan,
            facts=Facts.of(session, grid),
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


def _why_dense(session: Session, grid: Grid | None) -> str:
    its, happened = session.schedule, session.clock.dense
    if grid is None or session.calibrator is not None:
        return ""
    if happened > its.dense_steps:
        reasons = [(count, reason) for reason, count in session.counts.dense.items() if reason != "dense step"]
        return max(reasons)[1] if reasons else ""
    if happened == its.dense_steps == its.steps:
        return f"the first {its.dense_whole} of {'about ' * (its.whole > its.steps)}{its.whole} are"
    return ""


def _expected_gain(session: Session, layout: TokenLayout | None, plan: Plan | None) -> tuple[float, float] | None:
    if plan is None or session.backend != "triton":
        return None
    return session.policy.recipe.expected_gain(layout, plan.density)
