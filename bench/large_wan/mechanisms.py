"""What each mechanism of the method is worth on this bed: whole runs, their fidelity, and the time of their attention.

All clips of a row are sampled at once, the heads of each as heads of their own: ten clips of four heads make calls of
the size of one layer of a 14B video model. A run goes through the product's own session without a plan: it observes its
last dense step, plans, and is sparse from then on, with biases and masks measured as in the product. The
one threshold over all heads of a plan is therefore shared among the clips: one that needs more blocks takes them from
the others, so `psnr_each` depends on which clips run together.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...paro_runtime.plan.plan import Plan
from ...paro_runtime.report.report import Report
from ...paro_runtime.run.session import Session
from ..metrics import flicker
from .pack import unpack
from .policies import Row, mechanism_rows, policy_rows
from .routing import Router
from .timed import TimedBench, Times


@dataclass(frozen=True)
class Setup:
    """What all rows of a file have in common. repeats: timed runs of each row after one that only warms up."""

    weights: Path
    grid: tuple[int, int, int]
    clips: int
    steps: int
    dense_steps: int
    device: str
    backend: str
    precision: str
    repeats: int = 2
    first_seed: int = 1000

    def __post_init__(self) -> None:
        """ValueError where no step would be sparse, or nothing would be timed."""
        if self.dense_steps >= self.steps:
            raise ValueError(f"dense_steps: {self.dense_steps} of {self.steps} steps leave none to be sparse")
        if self.repeats < 1:
            raise ValueError(f"repeats: {self.repeats}, at least one run is timed")

    def bench(self) -> TimedBench:
        """The model and its dense run, in bf16 on a GPU and fp32 on a CPU."""
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        seeds = tuple(range(self.first_seed, self.first_seed + self.clips))
        return TimedBench(self.grid, self.weights, self.device, seeds, dtype, self.steps)

    def facts(self) -> dict:
        """JSON-ready: with the training step of the weights and the names of GPU and torch."""
        name = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "cpu"
        found = {"grid": "x".join(map(str, self.grid)), "clips": self.clips, "first_seed": self.first_seed}
        found |= {"steps": self.steps, "dense_steps": self.dense_steps, "backend": self.backend}
        found |= {"precision": self.precision, "repeats": self.repeats, "device": name, "torch": torch.__version__}
        return found | {"weights_step": unpack(self.weights)[1].get("step")}

    def rows(self) -> list[Row]:
        """All that make a difference in such runs, the default first."""
        return mechanism_rows(self.dense_steps, self.backend, self.precision) + policy_rows()


@dataclass(frozen=True)
class Sampled:
    """One run of a row: latents as in `TinyBench.sample`, and what it left behind. router: None where it had none."""

    latents: torch.Tensor
    times: Times
    session: Session
    report: Report
    router: Router | None


def sample_once(bench: TimedBench, setup: Setup, row: Row, density: float, plan: Plan | None) -> Sampled:
    """Sample all clips; plan: what the row's source gives. RuntimeError where a call that should be sparse was not."""
    session = bench.session(row.variant(density, setup.dense_steps, setup.backend, setup.precision), plan=plan)
    row.prepare(session)
    router = row.router() if row.router is not None else None
    latents, found = bench.timed_sample(bench.seeds, session, router, row.edit)
    times = Times.of(found, setup.steps, setup.dense_steps, row.free)
    report = session.finish()
    expected = bench.layers * (setup.steps - setup.dense_steps)
    if report.calls["sparse"] != expected:
        raise RuntimeError(f"{row.name}: {report.calls['sparse']} of {expected} calls were sparse\n{report.text()}")
    return Sampled(latents, times, session, report, router)


def measure(bench: TimedBench, setup: Setup, row: Row, density: float) -> dict:
    """One row, JSON-ready: sampled once to warm up and then `setup.repeats` times, figures of the last run but medians
    of the times.

    PSNR, SSIM and flicker are against the dense run. attention_seconds is Times.whole; kept_density the mean over the
    sparse steps of what the masks keep; sparse_step_ms the mean, ms_of_sparse_steps each.
    """
    plan = row.source(bench, row.variant(density, setup.dense_steps, setup.backend, setup.precision))
    last = sample_once(bench, setup, row, density, plan)
    times = []
    for _ in range(setup.repeats):
        last = sample_once(bench, setup, row, density, plan)
        times.append(last.times)
    report = last.report
    flickers = [flicker(*pair) for pair in zip(bench.decode(last.latents), bench.dense_video, strict=True)]
    result = {"name": row.name, "kind": row.kind, "density": density, "kept_density": round(_kept(last, setup), 4)}
    result |= bench.compare(last.latents)
    result |= {"flicker": round(statistics.mean(flickers), 4), "flicker_each": [round(one, 4) for one in flickers]}
    result |= _timed(times) | {"attention_error": report.attention_error, "plan": report.plan_source}
    result |= {"backend": report.backend, "precision": report.precision, "densities": report.densities}
    result |= {"sites_routed": report.sites_routed}
    result |= {"rotated": report.sites_rotated, "orders": report.orders_histogram, "free_masks": row.free}
    return result | {"calls": report.calls, "notes": report.notes}


def _kept(run: Sampled, setup: Setup) -> float:
    """Kept blocks / all blocks, mean over the sparse steps."""
    if run.router is not None and run.router.density is not None:
        return run.router.density
    plan, schedule = run.report.plan, run.session.schedule
    groups = [schedule.group(step, plan.groups) for step in range(setup.dense_steps, setup.steps)]
    return statistics.mean(plan.densities[group] for group in groups)


def _timed(times: list[Times]) -> dict:
    def median(of: Callable[[Times], float]) -> float:
        return statistics.median(map(of, times))

    steps = [statistics.median(values) for values in zip(*(one.sparse for one in times), strict=True)]
    return {
        "attention_seconds": median(lambda one: one.whole),
        "attention_seconds_each": [one.whole for one in times],
        "dense_steps_seconds": median(lambda one: one.dense),
        "once_seconds": median(lambda one: one.once),
        "sparse_step_ms": 1000 * statistics.mean(steps),
        "ms_of_sparse_steps": [round(1000 * value, 3) for value in steps],
    }


def chosen(rows: list[Row], densities: list[float], only: str | None) -> Iterator[tuple[Row, float]]:
    """Rows in whose `kind: name` the regular expression is found, at each density; the default, which others are
    compared with, in any case and first."""
    default, *others = rows
    wanted = [default, *(row for row in others if only is None or re.search(only, f"{row.kind}: {row.name}"))]
    for row in wanted:
        for density in densities:
            yield row, density


def run(
    setup: Setup,
    densities: list[float],
    path: Path,
    *,
    only: str | None = None,
    limit_seconds: float | None = None,
    told: Callable[[str], None] = print,
) -> list[dict]:
    """Measure what is chosen and write `path` after each row; rows that are in it already, of the same set-up on the
    same kind of device, are not measured again. limit_seconds: no row begins that might not end by then.

    Returns all rows. ValueError where the file is of another set-up.
    """
    began, facts = time.perf_counter(), setup.facts()
    rows = _taken_up(path, facts)
    done = {(row["name"], row["density"]) for row in rows}
    todo = [pair for pair in chosen(setup.rows(), densities, only) if (pair[0].name, pair[1]) not in done]
    bench = setup.bench()
    dense = bench.time_dense(setup.repeats)
    told(f"{facts['grid']} x {setup.clips} clips on {facts['device']}: dense {dense:.3f} s of attention")
    longest = 0.0
    for number, (row, density) in enumerate(todo):
        gone = time.perf_counter() - began
        if limit_seconds is not None and gone + longest > limit_seconds:
            told(f"stopped after {gone:.0f} s: {len(todo) - number} rows are left; the same command goes on")
            break
        result = measure(bench, setup, row, density)
        seconds = time.perf_counter() - began - gone
        longest = max(longest, seconds)
        rows.append(result | {"row_seconds": round(seconds, 2), "dense_attention_seconds": dense})
        write_json(path, {"facts": facts, "dense_attention_seconds": dense, "rows": rows})
        told(line(rows[-1]))
    return rows


def line(row: dict) -> str:
    """One row for people."""
    return (
        f"{row['name']} d {row['density']}: {row['psnr']:.2f} dB, worst {row['psnr_worst']:.2f}, "
        f"flicker {row['flicker']:.3f}, kept {row['kept_density']:.3f}, {row['attention_seconds']:.3f} s of attention "
        f"(dense {row['dense_attention_seconds']:.3f}), {row['sparse_step_ms']:.2f} ms a sparse step, "
        f"once {1000 * row['once_seconds']:.1f} ms [{row['row_seconds']:.1f} s]"
    )


def _taken_up(path: Path, facts: dict) -> list[dict]:
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    other = {key for key in facts if content["facts"].get(key) != facts[key]}
    if other:
        raise ValueError(f"{path}: made with another {', '.join(sorted(other))}; give another file")
    return content["rows"]


def write_json(path: Path, content: dict) -> None:
    """At once, so that a run may be stopped at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
