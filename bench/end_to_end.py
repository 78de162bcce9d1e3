"""One denoising step of real architectures at real sizes with random weights: the dense backend against PARO.

python bench/end_to_end.py [--models wan1.3b,wan14b,hunyuan15,flux] [--grids 720p,2048] [--densities 0.3,0.2,0.1]
                           [--precision auto] [--json FILE]

Linear layers, norms and attention shapes are the models' own (`bench/architectures.py`). Random weights say nothing
about quality: masks are bands of the given density in random orders, the tail is on, the plan is given, and the step is
one of those that do not measure the tail's bias. Attention is timed inside the step with device events. A density of 1
is PARO's dense kernel without any mask.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import _checkout

_checkout.register()

import torch  # noqa: E402
from comfyui_paro.bench.architectures import GRIDS, MODELS, RECIPES, TITLES, layout_of, random_model, step_of  # noqa: E402
from comfyui_paro.kernels.core.layout import TokenLayout  # noqa: E402
from comfyui_paro.kernels.core.pattern import MOST_EXPANSIONS  # noqa: E402
from comfyui_paro.paro_runtime.config.recipes import recipe_for  # noqa: E402
from comfyui_paro.paro_runtime.config.settings import Settings  # noqa: E402
from comfyui_paro.paro_runtime.plan.options import query_block  # noqa: E402
from comfyui_paro.paro_runtime.plan.orders import AXIS_ORDERS  # noqa: E402
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Plan, Site, SitePlan  # noqa: E402
from comfyui_paro.paro_runtime.run.policy import Policy  # noqa: E402
from comfyui_paro.paro_runtime.run.session import Session  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

IDENTITY = ModelIdentity("wan", "random", "random")
SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]
# The order in which the host asks torch for a dense backend on NVIDIA.
DENSE_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def banded_plan(layout: TokenLayout, heads: int, layers: int, density: float) -> Plan:
    """A plan of random orders whose masks are bands of uneven width around the diagonal, `density` on average."""
    block_q = query_block(layout.grid_tokens)
    rows, columns = -(-layout.grid_tokens // block_q), -(-layout.grid_tokens // 64)
    generator = torch.Generator().manual_seed(0)
    widths = torch.rand(heads, generator=generator) + 0.5
    widths = widths / widths.mean() * density * columns
    distance = (torch.arange(columns)[None] - torch.arange(rows)[:, None] * columns / rows).abs()
    distance = torch.minimum(distance, columns - distance)  # a band that wraps keeps every row equally long
    mask = distance[None] <= widths[:, None, None] / 2
    orders = [AXIS_ORDERS[i] for i in torch.randint(6, (heads,), generator=generator).tolist()]
    entry = SitePlan.create(orders, mask, torch.zeros(heads), torch.ones(heads))
    sites = {Site("double", i): entry for i in range(layers)}
    return Plan(IDENTITY, layout, block_q, sites, expansions=MOST_EXPANSIONS)


class AttentionTimer:
    """Wraps an attention callable and adds up the device time spent in it."""

    def __init__(self, attention) -> None:
        self.attention = attention
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, q, k, v, *, layer):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out = self.attention(q, k, v, layer=layer)
        end.record()
        self.events.append((begin, end))
        return out

    def milliseconds(self) -> float:
        """Sum over the calls since the last `milliseconds`; waits for the device."""
        torch.cuda.synchronize()
        total = sum(begin.elapsed_time(end) for begin, end in self.events)
        self.events.clear()
        return total


def dense_attention(q, k, v, *, layer):
    """The host's dense attention."""
    with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def time_step(step, attention, repeats: int) -> dict:
    """Milliseconds of one evaluation (best of `repeats` after one warm-up) and of its self-attention; peak GB."""
    timer = AttentionTimer(attention)
    best = None
    torch.cuda.reset_peak_memory_stats()
    for repeat in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out = step(timer)
        end.record()
        inside = timer.milliseconds()
        if not torch.isfinite(out).all():
            raise SystemExit("the step's result is not finite")
        whole = begin.elapsed_time(end)
        if repeat and (best is None or whole < best["step_ms"]):
            best = {"step_ms": whole, "attention_ms": inside, "rest_ms": whole - inside}
    return {**best, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def paro_attention(layout: TokenLayout, plan: Plan, recipe: str, precision: str, dense: bool = False):
    """The attention callable of a session that has this plan, and the session. dense: PARO's kernel, every block."""
    settings = Settings(
        preset="custom",
        density=max(plan.density, 0.01),
        precision=precision,
        dense_steps=len(SIGMAS) if dense else 0,
        dense_attention="paro",
        min_tokens=0,
        strict=True,
    )
    session = Session(Policy(IDENTITY, recipe_for(recipe), settings, plan=plan), sigmas=SIGMAS)
    # The first evaluation, which is not timed, measures the tail's bias, as few steps do
    # (`bench/calibration.py` tells what that costs); the third step goes by them, as most do.
    evaluations = [session.begin(layout=layout, sigma=SIGMAS[step]) for step in (0, 2)]
    measured = set()

    def attention(q, k, v, *, layer):
        evaluation = evaluations[layer in measured]
        measured.add(layer)
        return evaluation.attend(Site("double", layer), q, k, v, dense=lambda: dense_attention(q, k, v, layer=layer))

    return attention, session


def measure(name: str, size: str, densities: list[float], precision: str, repeats: int) -> list[dict]:
    """The rows of one model at one size: torch's dense attention, then PARO at each density."""
    grid = GRIDS[name][size]
    layout = layout_of(name, grid)
    config = MODELS[name]
    step = step_of(random_model(name), grid)
    common = {"model": name, "title": f"{TITLES[name]} {size}", "tokens": layout.length}
    dense = time_step(step, dense_attention, repeats)
    rows = [{**common, "method": "dense", **dense}]
    for density in densities:
        plan = banded_plan(layout, config.heads, config.layers, density)
        attention, session = paro_attention(layout, plan, RECIPES[name], precision, density == 1)
        row = time_step(step, attention, repeats)
        report = session.finish()
        gains = {
            "step_gain": dense["step_ms"] / row["step_ms"],
            "attention_gain": dense["attention_ms"] / row["attention_ms"],
        }
        kept = {
            "density": 1.0 if density == 1 else plan.density,
            "precision": report.precision,
            "sites_sparse": report.sites_sparse,
        }
        rows.append({**common, "method": "paro", **kept, **gains, **row})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--grids", default="", help="sizes to run, such as 720p,2048; all of each model's by default")
    parser.add_argument("--densities", default="1,0.3,0.2,0.1")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--repeats", type=int, default=2, help="timed evaluations; the best one counts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing is measured")
    import triton

    results = {
        "benchmark": "end_to_end",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "weights": "random",
        "rows": [],
    }
    densities = [float(density) for density in args.densities.split(",")]
    for name in args.models.split(","):
        for size in GRIDS[name]:
            if args.grids and size not in args.grids.split(","):
                continue
            rows = measure(name, size, densities, args.precision, args.repeats)
            torch.cuda.empty_cache()
            for row in rows:
                print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            results["rows"] += rows
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
