"""Suite `moved`: a plan made on one grid and used on another, against a plan made there.

Both keep the same density, drop the rest and are judged by the attention they keep. On planted heads a third sample is
held out; on the tiny trained model other videos are.
"""

from __future__ import annotations

import torch

from ...kernels.api import block_statistics, row_logsumexp
from ...paro_runtime.calibration import Calibrator
from ...paro_runtime.orders import order_table
from ...paro_runtime.plan import ModelIdentity, Plan, Site
from ...paro_runtime.portability import move_plan
from ...paro_runtime.recipes import MaskOptions
from ...paro_runtime.selection import mass_kept
from ...paro_runtime.statistics import geometry_of
from ...paro_runtime.tokens import TokenLayout
from .generator import HARD, TEXT, make_problem

SITE = Site("planted", 0)
IDENTITY = ModelIdentity("bench", "planted", "planted")
# From, to 1.5 times the resolution, to another aspect.
PLANTED_MOVES = ((9, 10, 12), ((9, 15, 18), (9, 16, 8)))
TINY_MOVES = ((8, 12, 12), ((8, 18, 18), (8, 18, 8)))


def _options(density: float) -> MaskOptions:
    return MaskOptions(density, "mass", "shared", None)


def kept_by(plan: Plan, site: Site, q: torch.Tensor, k: torch.Tensor) -> float:
    """Share of the grid's attention that a plan keeps of one call, mean over its heads."""
    entry, layout = plan.sites[site], plan.layout
    rows = torch.stack([order_table(name, layout.grid) for name in entry.orders]).to(q.device)
    seen = block_statistics(q, k, row_logsumexp(q, k), geometry_of(layout, plan.block_q), rows)
    return mass_kept(seen.mass, entry.mask(q.device)).mean().item()


def planted(old: tuple[int, int, int], new: tuple[int, int, int], density: float, seed: int) -> dict:
    """Attention kept on the new grid's held-out sample by the moved and by a fresh plan."""

    def plan_of(problem) -> Plan:
        calibrator = Calibrator(IDENTITY, _options(density))
        calibrator.observe(SITE, TokenLayout(TEXT, problem.grid), problem.q[:-1], problem.k[:-1])
        return calibrator.plan({})

    there = make_problem(new, HARD, seed, sinks_at_places=True)
    moved = move_plan(plan_of(make_problem(old, HARD, seed, sinks_at_places=True)), TokenLayout(TEXT, new))
    q, k = there.q[-1:], there.k[-1:]
    return _record("planted", old, new, density, seed, kept_by(moved, SITE, q, k), kept_by(plan_of(there), SITE, q, k))


def _record(bed, old, new, density, seed, moved: float, fresh: float) -> dict:
    record = {"bed": bed, "from": "x".join(map(str, old)), "to": "x".join(map(str, new)), "density": density}
    return record | {"seed": seed, "moved": moved, "fresh": fresh, "share": moved / fresh}


def tiny(new: tuple[int, int, int], densities=(0.1, 0.2, 0.3), steps=(1, 3, 5, 7), device: str = "cpu") -> list[dict]:
    """The same on the tiny trained model; plans from one video, judged on another at the same steps."""
    from .tiny import TinyBench, Variant

    old = TINY_MOVES[0]
    variant = Variant("moved", densities[0], 0, tail=False)

    def calibrator_on(grid) -> tuple[TinyBench, Calibrator]:
        bench = TinyBench(grid, device, seeds=())
        found = Calibrator(bench.identity, variant.options())
        bench.sample([1], bench.session(variant, calibrator=found, calibrate_steps=frozenset(steps)))
        return bench, found

    (_, first), (bench, fresh) = calibrator_on(old), calibrator_on(new)
    judged: dict[tuple[float, str], list[float]] = {}
    plans = {}
    for density in densities:
        first.options = fresh.options = _options(density)
        plans[density, "moved"] = move_plan(first.plan({}), TokenLayout(0, new))
        plans[density, "fresh"] = fresh.plan({})

    def judge(site, q, k):
        for key, plan in plans.items():
            judged.setdefault(key, []).append(kept_by(plan, site, q, k))

    bench.watch([77], judge, steps)
    mean = {key: sum(values) / len(values) for key, values in judged.items()}
    return [_record("tiny", old, new, d, 77, mean[d, "moved"], mean[d, "fresh"]) for d in densities]


def table(records: list[dict]) -> str:
    """Markdown, a line per move and density, mean over seeds."""
    lines = ["| bed | from | to | density | fresh plan keeps | moved plan keeps | share |", "|---|" + "---|" * 6]
    groups: dict[tuple, list[dict]] = {}
    for r in records:
        groups.setdefault((r["bed"], r["from"], r["to"], r["density"]), []).append(r)
    for key, found in groups.items():
        moved, fresh = (sum(r[name] for r in found) / len(found) for name in ("moved", "fresh"))
        lines.append("| " + " | ".join(map(str, key)) + f" | {fresh:.3f} | {moved:.3f} | {moved / fresh:.3f} |")
    return "\n".join(lines)
