"""Error and time of single attention calls: PARO under different orders, and block-sparse routing, on the same q, k, v.

Calls of a dense sampling of this bed, and planted heads. PARO is judged as a run has it: orders and budgets (on small
grids masks) of an earlier step of the same clips (of two other samples for planted heads), constant density, masks of
large grids and the tail's bias measured on the call itself. Routing looks at the call that it is judged
on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels.core.layout import TokenLayout
from ...paro_runtime.plan.plan import Plan, Site
from ..paro_bench.generator import HARD, TEXT, make_problem
from .call_methods import Call, How, Plans, exact_attention, judged, paro_rows, routed_row, sol_rows, why_no_sol_attn
from .mechanisms import Setup, write_json
from .timed import TimedBench, dense_attention, heads_apart


def rows_of(call: Call, plans: dict[tuple[str, float], Plan], densities: list[float], how: How) -> Iterator[dict]:
    """All methods on one call, JSON-ready. error: relative L2 against dense attention in float32; ms: of one call."""
    exact = exact_attention(call)
    place = {"call": call.what, "heads": call.q.shape[1], "tokens": call.q.shape[2]}

    def dense() -> torch.Tensor:
        return dense_attention(call.q, call.k, call.v)

    yield place | {"method": "dense, 16 bits", "density": 1.0} | judged(dense(), exact, dense, how)
    for row in paro_rows(call, exact, plans, how):
        yield place | row
    for density in densities:
        yield place | routed_row(call, exact, density, how)
    if why_no_sol_attn(how.device) is None:
        for row in sol_rows(call, exact, densities, how):
            yield place | row


@dataclass(frozen=True)
class Watched:
    """Which calls of a dense sampling are judged. plan_step: of which plans are made, before all of `steps`."""

    seeds: tuple[int, ...]
    layers: tuple[int, ...]
    plan_step: int
    steps: tuple[int, ...]

    def check(self, bench: TimedBench) -> None:
        """ValueError for steps or layers that the bench does not have, or a plan that would come too late."""
        if not self.plan_step < min(self.steps) <= max(self.steps) < bench.steps:
            raise ValueError(f"steps: {self.steps} must lie behind step {self.plan_step} and below {bench.steps}")
        if max(self.layers) >= bench.layers:
            raise ValueError(f"layers: {self.layers}, the model has {bench.layers}")


def judge_bed(
    bench: TimedBench, watched: Watched, densities: list[float], how: How, take: Callable[[dict], None]
) -> None:
    """Sample densely, the heads of all clips side by side, and give `take` the rows of every call that is judged."""
    watched.check(bench)
    plans, made, now = Plans(densities, how), {}, 0

    def see(call: Call) -> None:
        if now == watched.plan_step:
            plans.observe(call)
            return
        if not made:
            made.update(plans.made())
        for row in rows_of(call, made, densities, how):
            take(row)

    def attention(q, k, v, *, layer):
        apart = tuple(map(heads_apart, (q, k, v)))
        if layer in watched.layers and now in (watched.plan_step, *watched.steps):
            see(Call(f"layer {layer}, step {now + 1} of {bench.steps}", Site("block", layer), bench.layout, *apart))
        return dense_attention(*apart).reshape(q.shape)

    def on_step(step, _):
        nonlocal now
        now = step

    bench._sample(*bench.start(watched.seeds), attention, on_step)


def judge_planted(
    grid: tuple[int, int, int], densities: list[float], how: How, dtype: torch.dtype, take: Callable[[dict], None]
) -> None:
    """Give `take` the rows of twelve planted heads with 64 text tokens in front: plans of two samples, judged on a
    third."""
    problem, layout, site = make_problem(grid, HARD), TokenLayout(TEXT, grid), Site("planted", 0)
    plans, last = Plans(densities, how), problem.q.shape[0] - 1
    for sample in range(last + 1):
        parts = (x[sample : sample + 1].to(how.device, dtype) for x in (problem.q, problem.k, problem.v))
        call = Call("planted", site, layout, *parts)
        if sample < last:
            plans.observe(call)
    for row in rows_of(call, plans.made(), densities, how):
        take(row)


def table(rows: list[dict]) -> str:
    """Markdown: relative L2 error and ms of each method and density, one column for each call."""
    calls = list(dict.fromkeys(row["call"] for row in rows))
    found = {(row["method"], row["density"], row["call"]): row for row in rows}
    lines = ["| method | density | " + " | ".join(calls) + " |", "|---" * (2 + len(calls)) + "|"]
    for method, density in dict.fromkeys((row["method"], row["density"]) for row in rows):
        cells = [found.get((method, density, call)) for call in calls]
        figures = ["" if row is None else f"{row['error']:.4f}, {row['ms']:.2f} ms" for row in cells]
        lines.append(f"| {method} | {'-' if density is None else density} | {' | '.join(figures)} |")
    return "\n".join(lines)


def tell_what_is_missing(device: str) -> str | None:
    """Say loudly that the host's kernel is left out, and why; the reason, or None where it runs."""
    reason = why_no_sol_attn(device)
    if reason is not None:
        print(f"*** NOT MEASURED: sol_attn: {reason} ***", file=sys.stderr, flush=True)
    return reason


def run(setup: Setup, densities: list[float], layers: list[int], steps: list[int], path: Path) -> str:
    """Judge calls of the bed and planted heads; `path` is written after each row. Returns the table."""
    how = How(setup.device, setup.backend, setup.precision, setup.repeats)
    facts = setup.facts() | {"not_measured": tell_what_is_missing(setup.device)}
    rows: list[dict] = []

    def take(row: dict) -> None:
        rows.append(row)
        write_json(path, {"facts": facts, "rows": rows})

    dtype = torch.bfloat16 if setup.device.startswith("cuda") else torch.float32
    bench = TimedBench(setup.grid, setup.weights, setup.device, (), dtype, setup.steps)
    seeds = tuple(range(setup.first_seed, setup.first_seed + setup.clips))
    watched = Watched(seeds, tuple(layers), max(0, setup.dense_steps - 1), tuple(steps))
    judge_bed(bench, watched, densities, how, take)
    judge_planted(setup.grid, densities, how, dtype, take)
    return table(rows)
