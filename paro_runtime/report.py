"""What a run tells its user: one line, a text, a picture, and the same as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .orders import ALL_ORDERS
from .plan import Plan

if TYPE_CHECKING:
    from .session import Grid, Session
    from .tokens import TokenLayout

# One colour per order, told apart also without red-green vision (Okabe and Ito's palette).
ORDER_COLOURS = dict(
    zip(
        ALL_ORDERS,
        (
            (120, 120, 120),
            (86, 180, 233),
            (0, 114, 178),
            (230, 159, 0),
            (0, 158, 115),
            (213, 94, 0),
            (204, 121, 167),
            (240, 228, 66),
            (170, 110, 40),
            (220, 190, 255),
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class Report:
    """Figures of one run. Times are wall-clock seconds, medians per step; `fallbacks`, `passed` are (reason, count).

    dense_steps: those in which no call was sparse, of the `steps` that happened or, where other nodes skip some, were
    asked for. why_dense: where there are more of them than in a usual run, or no others.
    attention_error: relative L2 of sparse attention against exact one, on up to MOST_ROWS rows in the steps that
    make corrections: of all together, and of the worst layer in one of those steps. None where it was not measured.
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
    heads_corrected: int
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
            heads_corrected=session.correction.heads[0] if session.correction is not None else 0,
            sites_routed=len(session.routed_sites),
            attention_error=session.correction.error if session.correction is not None else None,
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
        )

    def as_dict(self) -> dict:
        """JSON-ready, without the plan."""
        values = {key: value for key, value in self.__dict__.items() if key != "plan"}
        return {**values, "grid": list(self.grid), "fallbacks": [list(f) for f in self.fallbacks]}

    @property
    def gain(self) -> float | None:
        """How much faster a sparse step was than a dense one, or None when there was not one of each."""
        if not self.step_seconds.keys() >= {"dense", "sparse"}:
            return None
        return self.step_seconds["dense"] / self.step_seconds["sparse"]

    def status(self) -> str:
        """One line for the node."""
        if not self.sites:
            reason = self.passed[0][0] if self.passed else "no self-attention call was seen"
            return f"{self.family}: passed through · {reason}"
        share = f"{self.sites_sparse}/{self.sites} sites sparse"
        density = f"density {self.density:.2f}{range_text(self.densities)}"
        parts = [self.family, f"{self.tokens:,} tokens", share, density, self.precision]
        why = f" ({self.why_dense})" if self.why_dense else ""
        parts.append(f"{self.dense_steps}/{self.steps} steps dense{why}")
        if self.gain is not None and self.backend == "triton":
            parts.append(f"sparse steps {self.gain:.2f}x as fast as dense ones")
        if self.fallbacks:
            parts.append(f"{sum(n for _, n in self.fallbacks)} calls fell back: {self.fallbacks[0][0]}")
        return " · ".join(parts)

    def text(self) -> str:
        """Several lines, for people."""
        grid = "x".join(map(str, self.grid))
        lines = [
            self.status(),
            f"tokens: {self.prefix} + {grid} + {self.suffix} on {self.device}",
            f"kernels: {self.backend}, {self.precision}",
            f"plan: {self.plan_source}, density {self.density:.3f}{range_text(self.densities)}, "
            f"attention kept {self._kept()}",
            f"rotated before INT8: {self.sites_rotated} of {self.sites} sites",
            f"corrected by their mean queries: {self.heads_corrected} heads",
            f"masks measured in this run: {self.sites_routed} of {self.sites} sites",
            f"attention error: {self._error()}",
            f"calibration took {self.calibration_seconds:.2f} s, measuring the tail {self.tail_seconds:.2f} s",
        ]
        if self.backend == "reference" and self.sites_sparse:
            lines.append("the PyTorch reference is running: right, but not faster than dense attention")
        if self.orders_histogram:
            lines.append("orders: " + ", ".join(f"{n} {name}" for name, n in self.orders_histogram.items()))
        if self.expected_gain is not None:
            low, high = self.expected_gain
            lines.append(f"expected: sparse steps {low:.2f} to {high:.2f}x as fast as dense ones, by token count alone")
        lines += [f"a {kind} step took {seconds:.2f} s" for kind, seconds in self.step_seconds.items()]
        lines += [f"calls: {name} {count}" for name, count in self.calls.items()]
        lines += [f"fell back {count} times: {reason}" for reason, count in self.fallbacks]
        lines += [f"passed through {count} times: {reason}" for reason, count in self.passed]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _error(self) -> str:
        if self.attention_error is None:
            return "not measured"
        whole, worst = self.attention_error
        return f"{whole:.1%}, worst layer {worst:.1%} (relative L2, on a sample of the rows)"

    def _kept(self) -> str:
        target = self.plan.settings.get("mass_target", 0) if self.plan else 0
        missed = f" ({target:.1%} were wanted, the density allows no more)" if self.mass_kept < target else ""
        return f"{self.mass_kept:.1%}{missed}"

    def picture(self) -> torch.Tensor | None:
        """Order and density of every head: float32 `[1, height, width, 3]` in 0..1, or None without a plan."""
        return plan_picture(self.plan) if self.plan is not None else None


def range_text(densities: list[float]) -> str:
    """` (0.41 to 0.20)`: densities of the first and the last group of sparse steps; nothing where all are alike."""
    return f" ({densities[0]:.2f} to {densities[-1]:.2f})" if len(densities) > 1 else ""


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


def plan_picture(plan: Plan) -> torch.Tensor:
    """Two panels, sites down and heads across: colour = order, brightness = density. float32 `[1, h, w, 3]`, 0..1."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont  # the host's own dependency; only pictures need it

    sites = sorted(plan.sites.items())
    heads = max(len(entry.orders) for _, entry in sites)
    cell = max(6, min(28, 700 // max(heads, len(sites) // 2)))
    left, top, gap, legend = 120, 66, 48, 30
    panel = heads * cell
    width = max(left + 2 * panel + gap + 90, 620)
    height = top + len(sites) * cell + legend + 24
    image = Image.new("RGB", (width, height), (24, 24, 27))
    draw = ImageDraw.Draw(image)
    font, ink = ImageFont.load_default(), (228, 228, 231)
    grid = "x".join(map(str, plan.layout.grid))
    density = f"density {plan.density:.3f}{range_text(plan.densities)}"
    title = f"{plan.identity.family}  grid {grid}  {density}  attention kept {plan.mass_kept:.1%}"
    draw.text((12, 10), title, ink, font)
    right = left + panel + gap
    draw.text((left, top - 30), "order per head", ink, font)
    draw.text((right, top - 30), "density per head", ink, font)
    every = max(1, 14 // cell)
    for row, (site, entry) in enumerate(sites):
        y = top + row * cell
        if row % every == 0:
            draw.text((12, y + cell // 2 - 6), site.name, ink, font)
        for column, (name, density) in enumerate(zip(entry.orders, entry.density.mean(0).tolist(), strict=True)):
            box = (column * cell, y, column * cell + cell - 2, y + cell - 2)
            draw.rectangle((left + box[0], box[1], left + box[2], box[3]), fill=ORDER_COLOURS[name])
            shade = int(40 + 215 * min(1.0, density))
            place = (right + box[0], box[1], right + box[2], box[3])
            draw.rectangle(place, fill=(shade, int(shade * 0.8), 40))
            if cell >= 26:
                draw.text((place[0] + 3, y + 7), f"{density:.2f}", (0, 0, 0) if shade > 130 else ink, font)
    x, y = left, top + len(sites) * cell + 14
    for name, count in plan.orders_histogram().items():
        draw.rectangle((x, y, x + 12, y + 12), fill=ORDER_COLOURS[name])
        draw.text((x + 17, y), f"{name} {count}", ink, font)
        x += 75
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]
