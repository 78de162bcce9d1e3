"""Suite `synthetic`: which method keeps most attention and least changes the output, on planted heads.

Orders, masks and biases come from the runtime, outputs from the kernels' reference. Masks are calibrated on two samples
and judged on a third; only video queries count. Mass kept is per query and includes the text, which is never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.attention.api import sparse_attention as run_kernel
from ...kernels.core.inputs import AttentionInputs, ScoreInputs
from ...kernels.core.layout import TokenLayout, geometry_of
from ...kernels.core.pattern import MOST_EXPANSIONS
from ...kernels.core.precision import PRECISIONS
from ...paro_runtime.attention.patterns import build_pattern
from ...paro_runtime.calibration.mask_choice import PerHeadBudget, SharedBudget, masks_by
from ...paro_runtime.calibration.observe import observe
from ...paro_runtime.calibration.options import StatisticsOptions
from ...paro_runtime.calibration.order_choice import first_best, mass_kept_scores, sums_under_orders
from ...paro_runtime.calibration.tail_fit import bias_at, observe_tail
from ...paro_runtime.plan.orders import ORIGINAL, candidate_orders, order_table, tiled_orders
from .baselines import band_mask, radial_mask, random_mask
from .generator import ARCHETYPES, TEXT, Level, Problem, make_problem

GRIDS = ((9, 15, 13), (8, 12, 20), (7, 11, 17), (11, 13, 13))  # the last two have prime sides only
DENSITIES = (0.1, 0.2, 0.3)
POOL = 64


@dataclass(frozen=True)
class Choice:
    """One method's answer for twelve heads: order names, mask `[12, q_blocks, k_blocks]`, tail bias `[12]` or None.

    expansions: of the tail's pools, 0 for plain means.
    """

    orders: tuple[str, ...]
    mask: torch.Tensor
    bias: torch.Tensor | None = None
    expansions: int = 0


class SyntheticCase:
    """One grid, level and seed: statistics of the calibration samples, and the dense answer of the held-out one."""

    def __init__(self, grid: tuple[int, int, int], level: Level, seed: int) -> None:
        self.problem: Problem = make_problem(grid, level, seed)
        self.layout = TokenLayout(TEXT, grid)
        self.geometry = geometry_of(self.layout, 64)
        self.seed = seed
        self.candidates = candidate_orders(grid) + tiled_orders(grid)
        p = self.problem
        self.calibration = self._all_orders(p.q[:-1], p.k[:-1])
        self.held_out = self._all_orders(p.q[-1:], p.k[-1:])
        self.dense = torch.nn.functional.scaled_dot_product_attention(p.q[-1:], p.k[-1:], p.v[-1:])

    def _all_orders(self, q: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
        """Block sums of every head under every order: the oracle's knowledge, and the selectors' ground truth."""
        masses = sums_under_orders(ScoreInputs(q, k), self.geometry, self.candidates)
        return dict(zip(self.candidates, masses, strict=True))

    def _gather(self, seen: dict[str, torch.Tensor], orders: tuple[str, ...]) -> torch.Tensor:
        return torch.stack([seen[name][head] for head, name in enumerate(orders)])

    def selected(self, order: str, density: float) -> tuple[str, ...]:
        """What the runtime's own selector chooses from the calibration samples."""
        p = self.problem
        options = StatisticsOptions(density, order, None)
        seen = observe(ScoreInputs(p.q[:-1], p.k[:-1]), self.layout, 64, options)
        return tuple(seen.candidates[i] for i in seen.choice.tolist())

    def _with_tail(self, orders: tuple[str, ...], mask: torch.Tensor, density: float, expansions: int) -> Choice:
        """With the bias of least output error, as the calibrator finds it."""
        p = self.problem
        tables = torch.stack([order_table(name, self.layout.grid) for name in orders])
        pools = {"pool": POOL, "expansions": expansions}
        inputs = AttentionInputs(p.q[:-1], p.k[:-1], p.v[:-1], self.geometry, tables)
        seen = observe_tail(inputs, density=density, **pools)
        return Choice(orders, mask, bias_at(seen.curves, mask.float().mean((1, 2))), expansions)

    def _scores(self, density: float) -> torch.Tensor:
        return mass_kept_scores([self.calibration[name] for name in self.candidates], density)

    def best_global(self, density: float) -> tuple[str, ...]:
        """The one order that suits all heads best."""
        scores = self._scores(density)
        return (self.candidates[int(scores.mean(0).argmax())],) * len(ARCHETYPES)

    def regret(self, orders: tuple[str, ...], density: float) -> torch.Tensor:
        """Mass that a better choice of order would have kept on the calibration samples, per head."""
        scores = self._scores(density)
        chosen = torch.tensor([self.candidates.index(name) for name in orders])
        return scores.amax(1) - scores.gather(1, chosen[:, None])[:, 0]

    def methods(self, density: float) -> dict[str, Choice]:
        """Every method's choice at one density."""
        original = (ORIGINAL,) * len(ARCHETYPES)
        ours = self.selected("mass", density)
        named = {
            "original order": original,
            "best global order": self.best_global(density),
            "paper's metric": self.selected("paper", density),
            "ours": ours,
        }
        result = {}
        for name, orders in named.items():
            mass = self._gather(self.calibration, orders)
            mask = masks_by(PerHeadBudget, [mass], density)[0]
            result[name] = Choice(orders, mask)
            if name in ("original order", "ours"):
                result[f"{name} + tail"] = self._with_tail(orders, mask, density, MOST_EXPANSIONS)
            if name == "ours":
                result["ours + tail of plain means"] = self._with_tail(orders, mask, density, 0)
                mask = masks_by(SharedBudget, [mass], density)[0]
                result["ours, shared budget"] = Choice(orders, mask)
                result["ours, shared budget + tail"] = self._with_tail(orders, mask, density, MOST_EXPANSIONS)
        for name, orders in (("oracle, original order", original), ("oracle, our orders", ours)):
            mass = self._gather(self.held_out, orders)
            result[name] = Choice(orders, masks_by(PerHeadBudget, [mass], density)[0])
        result["radial"] = self._fixed(original, radial_mask(self.geometry, density))
        result["window"] = self._window(density)
        result["random"] = self._fixed(original, random_mask(self.geometry, density, self.seed))
        return result

    def _fixed(self, orders: tuple[str, ...], mask: torch.Tensor) -> Choice:
        return Choice(orders, mask.expand(len(orders), -1, -1).clone())

    def _window(self, density: float) -> Choice:
        """The better of a spatial band (FHW) and a temporal one (HWF) per head, by calibrated mass."""
        band = band_mask(self.geometry, density)
        kinds = [name for name in (ORIGINAL, "HWF") if name in self.candidates]
        kept = torch.stack([(self.calibration[name] * band).sum((1, 2)) for name in kinds], 1)
        return self._fixed(tuple(kinds[i] for i in first_best(kept).tolist()), band)

    def judge(self, choice: Choice) -> dict[str, list[float]]:
        """Mass kept, relative L1, cosine and density per head on the held-out sample."""
        p = self.problem
        pattern = build_pattern(
            self.layout, choice.orders, choice.mask, choice.bias, pool=POOL, expansions=choice.expansions
        )
        out = run_kernel(p.q[-1:], p.k[-1:], p.v[-1:], pattern, PRECISIONS["16bit"])
        got, want = out[0, :, TEXT:], self.dense[0, :, TEXT:]
        mass = self._gather(self.held_out, choice.orders)
        dropped = mass.mul(~choice.mask).sum((1, 2)) / self.layout.grid_tokens
        return {
            "mass": (1 - dropped).tolist(),
            "l1": ((got - want).abs().sum((1, 2)) / want.abs().sum((1, 2))).tolist(),
            "cosine": torch.nn.functional.cosine_similarity(got, want, dim=2).mean(1).tolist(),
            "density": choice.mask.float().mean((1, 2)).tolist(),
        }


def run_case(grid: tuple[int, int, int], level: Level, seed: int, densities=DENSITIES) -> list[dict]:
    """One record per density and method, means over the twelve heads, with the selectors' regret where one chose."""
    case = SyntheticCase(grid, level, seed)
    records = []
    for density in densities:
        for name, choice in case.methods(density).items():
            figures = {key: sum(values) / len(values) for key, values in case.judge(choice).items()}
            record = {"grid": "x".join(map(str, grid)), "level": level.name, "seed": seed, "density": density}
            record |= {"method": name, "tail": choice.bias is not None}
            record |= {"kept_density": figures.pop("density"), **figures}
            if name in ("ours", "paper's metric"):
                regret = case.regret(choice.orders, density)
                planted = [kind.orders for kind in ARCHETYPES]
                hits = [order in orders for order, orders in zip(choice.orders, planted, strict=True) if orders]
                record |= {"regret_worst": regret.max().item(), "in_planted_class": sum(hits) / len(hits)}
            records.append(record)
    return records


def table(records: list[dict]) -> str:
    """Markdown: a line per grid, level, density and method, means over the seeds."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        key = (record["grid"], record["level"], record["density"], record["method"])
        groups.setdefault(key, []).append(record)
    lines = ["| grid | level | density | method | mass kept | rel. L1 | cosine | worst regret |", "|---|" + "---|" * 7]
    for (grid, level, density, method), found in groups.items():
        mean = {key: sum(r[key] for r in found) / len(found) for key in ("mass", "l1", "cosine")}
        regrets = [r["regret_worst"] for r in found if "regret_worst" in r]
        regret = f"{max(regrets):.3f}" if regrets else ""
        cells = f"{mean['mass']:.3f} | {mean['l1']:.4f} | {mean['cosine']:.4f} | {regret}"
        lines.append(f"| {grid} | {level} | {density} | {method} | {cells} |")
    return "\n".join(lines)
