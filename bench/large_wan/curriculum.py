"""Which token grids are trained when, and what a step costs.

Most steps are on small grids, where a step sees many clips and attention is cheap; the last tenth is on grids of real
sizes. Frames per clip rise with them, so the rotary positions of the large grids are learned at the end only.
"""

import math
from dataclasses import dataclass

from ...tests.tiny_wan.model import TinyWanConfig

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Stage:
    """Grids that are drawn, each alike, until `end` (a share of all steps)."""

    end: float
    grids: tuple[Grid, ...]


STAGES = (
    Stage(0.60, ((8, 8, 8), (8, 10, 14), (10, 12, 10), (8, 12, 12))),
    Stage(0.90, ((12, 14, 14), (10, 16, 16), (16, 12, 16), (16, 16, 12))),
    Stage(1.00, ((16, 20, 20), (16, 20, 28), (21, 24, 24), (21, 30, 30))),
)
# Trained by nothing; for measurements that ask whether something carries over.
HELD_OUT_GRIDS = ((9, 13, 11), (18, 22, 26))
TOY_STAGES = (Stage(0.5, ((2, 3, 4), (3, 4, 3))), Stage(1.0, ((3, 4, 6),)))


def stage_at(step: int, steps: int, stages: tuple[Stage, ...] = STAGES) -> Stage:
    """The stage of a step of 0 to steps - 1."""
    return next((stage for stage in stages if step < stage.end * steps), stages[-1])


def clips(grid: Grid, tokens: int) -> int:
    """Clips of a step on one GPU: as many as fit `tokens` tokens, at least two."""
    return max(2, tokens // math.prod(grid))


def flops(grid: Grid, batch: int, config: TinyWanConfig) -> float:
    """Floating-point operations of one training step, the backward pass counted as two forward ones.

    Forward and per token and layer: 2 for each weight that a token meets (self-attention 4 dim^2, cross-attention 2
    dim^2, feed-forward 2 dim ffn_dim) and 4 N dim for the two products of attention over N tokens. Prompt, patches and
    norms are left out (below 3 %).
    """
    tokens = math.prod(grid)
    weights = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim
    return 3.0 * batch * tokens * config.layers * (2 * weights + 4 * tokens * config.dim)


def table(config: TinyWanConfig, tokens: int, steps: int, flops_per_second: float) -> str:
    """Markdown: of every stage its mean step in FLOP, its seconds at an assumed speed of one GPU, and all of them."""
    lines = ["| grids | clips a step | TFLOP a step | seconds a step | steps | minutes |", "|---|---|---|---|---|---|"]
    begin, total = 0.0, 0.0
    for stage in STAGES:
        batches = [clips(grid, tokens) for grid in stage.grids]
        cost = sum(flops(grid, b, config) for grid, b in zip(stage.grids, batches, strict=True)) / len(batches)
        count = round((stage.end - begin) * steps)
        seconds = cost / flops_per_second
        names = ", ".join("x".join(map(str, grid)) for grid in stage.grids)
        figures = f"{min(batches)} to {max(batches)} | {cost / 1e12:.1f} | {seconds:.3f} | {count}"
        lines.append(f"| {names} | {figures} | {count * seconds / 60:.1f} |")
        begin, total = stage.end, total + count * seconds
    mean = total / steps
    return "\n".join([*lines, "", f"{steps} steps: {total / 60:.0f} minutes; 10 minutes: {600 / mean:.0f} mean steps."])
