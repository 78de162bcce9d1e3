"""What calibrating costs against dense attention, part by part: one site of large models on a GPU, or a whole step of
the tiny model on one core of a CPU.

python bench/calibration.py [--shapes wan720p,wan480p_small,flux] [--heads 8] [--json FILE]
python bench/calibration.py --tiny [--repeats 15] [--json FILE]

Times are wall-clock medians in milliseconds that wait for the device. `observe` is what a calibrating step pays per
site: block sums of some rows under every order, the tail's errors and curves, copies to the CPU and all that lies
between. In some sparse steps `refresh` measures the tail's bias again, and `look` a site's masks. `plan` makes the
three masks of one site at the end; `every_row` is what masks by mass would need beside the tail if they did not take
mean queries here. Without a GPU the first form measures nothing.

`--tiny` records queries, keys and values of the tiny trained model in the third of eight steps and alternates between
the attention of its four layers as torch computes it (float32) and all that a calibrating step does beside it: four
observations and the plan. `ratio` is the median over the repeats, `first_ratio` that of the first time in a process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import _checkout

_checkout.register()

import torch  # noqa: E402
from comfyui_paro.bench.attention import commit, peak_mib  # noqa: E402
from comfyui_paro.bench.paro_bench.tiny import GRIDS, LAYERS, TinyBench, Variant  # noqa: E402
from comfyui_paro.bench.problems import SHAPES, Shape, inputs  # noqa: E402
from comfyui_paro.bench.rivals import RIVALS  # noqa: E402
from comfyui_paro.kernels.core.inputs import AttentionInputs, ScoreInputs  # noqa: E402
from comfyui_paro.kernels.core.layout import TokenLayout, geometry_of  # noqa: E402
from comfyui_paro.kernels.core.pattern import SparsePattern  # noqa: E402
from comfyui_paro.kernels.core.sampling import sampled_rows  # noqa: E402
from comfyui_paro.kernels.statistics.api import block_statistics, row_logsumexp  # noqa: E402
from comfyui_paro.kernels.statistics.logit_errors import logit_errors  # noqa: E402
from comfyui_paro.kernels.tail_error.api import block_costs  # noqa: E402
from comfyui_paro.paro_runtime.attention.patterns import pattern_of  # noqa: E402
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator  # noqa: E402
from comfyui_paro.paro_runtime.calibration.options import StatisticsOptions  # noqa: E402
from comfyui_paro.paro_runtime.calibration.order_choice import order_scores  # noqa: E402
from comfyui_paro.paro_runtime.calibration.tail_fit import measured_rows, observe_bias, observe_tail  # noqa: E402
from comfyui_paro.paro_runtime.plan.options import MaskOptions, query_block  # noqa: E402
from comfyui_paro.paro_runtime.plan.orders import order_table  # noqa: E402
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site  # noqa: E402
from comfyui_paro.paro_runtime.run.masks import routed_bits  # noqa: E402

DENSITY = 0.2
POOL = 64
DENSE = ("sdpa_flash", "sdpa_cudnn")
SITE = Site("double", 0)
IDENTITY = ModelIdentity("bench", "bench", "bench")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_ms(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median wall-clock time of `run` in ms, device work included, after one run that may compile."""
    run()
    times = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def dense_ms(q, k, v, repeats: int) -> tuple[float, str]:
    """The faster of torch's dense attentions, and which it is. Raises RuntimeError if none runs."""
    found = []
    for name in DENSE:
        try:
            found.append((median_ms(RIVALS[name].make(q, k, v, None), repeats, q.device), name))
        except RuntimeError:
            continue
    if not found:
        raise RuntimeError(f"none of {', '.join(DENSE)} runs here")
    return min(found)


def measure(shape: Shape, heads: int, device: torch.device, repeats: int = 5) -> dict:
    """One row: parts in ms, their ratio to dense attention, and memory in MiB beside the inputs (None on a CPU).

    The mask and the tables of the orders are inputs.
    """
    on_gpu = device.type == "cuda"
    q, k, v = inputs(shape, heads, torch.bfloat16 if on_gpu else torch.float32, device)
    layout = TokenLayout(shape.prefix, shape.grid, shape.suffix)
    g = geometry_of(layout, query_block(layout.grid_tokens))
    attention, dense_name = dense_ms(q, k, v, repeats)
    names = StatisticsOptions(DENSITY).candidates(shape.grid)
    tables = [order_table(name, shape.grid).to(device) for name in names]
    rows = torch.stack([tables[head % len(tables)] for head in range(heads)])
    scores = ScoreInputs(q, k)
    whole = scores.with_values(v, g, rows)

    def every_row():
        return block_statistics(scores, row_logsumexp(scores), g, rows)

    parts = {
        "orders": lambda: order_scores(scores, g, StatisticsOptions(DENSITY)),
        "costs": lambda: block_costs(whole, sampled_rows(g, device), pool=POOL),
        "tail": lambda: observe_tail(whole, density=DENSITY, pool=POOL),
        "every_row": every_row,
    }
    times = {f"{name}_ms": median_ms(run, repeats, device) for name, run in parts.items()}
    options = MaskOptions(DENSITY, "mass", "shared", POOL, density_schedule="falling")
    calibrators: list[Calibrator] = []

    def observe():
        calibrators[:] = [Calibrator(IDENTITY, options)]
        calibrators[0].observe(SITE, layout, q, k, v)

    observe()
    times["observe_ms"] = median_ms(observe, repeats, device)
    peak = peak_mib(observe, device)
    plans: list = []
    times["plan_ms"] = median_ms(lambda: plans.append(calibrators[0].plan({})), 1, device)
    entry = plans[0].sites[SITE]

    def look(pattern: SparsePattern) -> torch.Tensor:
        return routed_bits(entry, 1, scores, pattern)

    pattern = pattern_of(
        entry, layout, group=1, block_q=g.block_q, pool=POOL, expansions=plans[0].expansions, kv_heads=heads,
        device=device, measure=look,
    )  # fmt: skip
    mask = pattern.mask

    def refresh():
        return observe_bias(whole, mask, pool=POOL, rows=measured_rows(g.grid_tokens))

    times["refresh_ms"] = median_ms(refresh, repeats, device)
    times["look_ms"] = median_ms(lambda: look(pattern), repeats, device)
    return {
        "length": shape.length,
        "heads": heads,
        "dim": shape.dim,
        "block_q": g.block_q,
        "orders": len(names),
        "dense": dense_name,
        "dense_ms": attention,
        **times,
        "ratio": times["observe_ms"] / attention,
        "refresh_ratio": times["refresh_ms"] / attention,
        "peak_mib": peak,
        "refresh_peak_mib": peak_mib(refresh, device),
    }


def recorded(bench: TinyBench, seed: int, step: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values `[1, H, L, D]` of every layer in one step of a dense run."""
    found = []

    def see(_, *call):
        found.append(tuple(x.clone(memory_format=torch.preserve_format) for x in call))

    bench.watch([seed], see, {step})
    return found


def measure_tiny(grid: tuple[int, int, int], repeats: int, step: int = 2, seed: int = 1000) -> dict:
    """One row: a calibrating step of the tiny model in ms, medians, and its ratio to the attention of that step."""
    bench = TinyBench(grid, seeds=())
    calls = recorded(bench, seed, step)
    variant = Variant("ours, passing", DENSITY, step + 1, plan="passing")
    layout, options = bench.layout, StatisticsOptions(DENSITY)
    g = geometry_of(layout, query_block(layout.grid_tokens))
    names = options.candidates(grid)
    rows = torch.stack([order_table(names[head % len(names)], grid) for head in range(calls[0][0].shape[1])])

    def calibrate():
        calibrator = Calibrator(IDENTITY, variant.options(), method=variant.method.in_passing(noisy=step == 0))
        for layer, (q, k, v) in enumerate(calls):
            calibrator.observe(Site("block", layer), layout, q, k, v, step=step)
        return calibrator.plan({})

    parts = {
        "attention": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "orders": lambda q, k, v: order_scores(ScoreInputs(q, k), g, options),
        "tail": lambda q, k, v: observe_tail(AttentionInputs(q, k, v, g, rows), density=DENSITY, pool=POOL),
        "rotation": lambda q, k, v: logit_errors(ScoreInputs(q, k), g, rows),
    }
    whole = {"all": calibrate}
    whole |= {name: lambda run=run: [run(*call) for call in calls] for name, run in parts.items()}
    times: dict[str, list[float]] = {name: [] for name in whole}
    for _ in range(repeats + 1):
        for name, run in whole.items():
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) * 1e3)
    # A process pays more the first time: tables of orders, and torch's own start.
    first = {name: found.pop(0) for name, found in times.items()}
    row = {"grid": "x".join(map(str, grid)), "length": layout.length, "layers": LAYERS, "step": step}
    row |= {f"{name}_ms": statistics.median(found) for name, found in times.items()}
    row["first_ratio"] = first["all"] / first["attention"]
    return row | {"ratio": statistics.median(map(float.__truediv__, times["all"], times["attention"]))}


def cpu_name() -> str:
    """As Linux knows it, else what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def tiny_main(repeats: int, path: Path | None) -> int:
    """Measure every grid of the tiny model on one core."""
    torch.set_num_threads(1)
    made_on = {"cpu": cpu_name(), "threads": 1, "torch": torch.__version__, "python": platform.python_version()}
    results = {"benchmark": "tiny calibration", **made_on, "date": date.today().isoformat(), "commit": commit()}
    results |= {"repeats": repeats, "rows": []}
    for grid in GRIDS:
        results["rows"].append(measure_tiny(grid, repeats))
        print(_line(results["rows"][-1]), flush=True)
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def _line(row: dict) -> str:
    return json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="wan720p,wan480p_small,flux", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--heads", type=int, help="heads at most (default: the model's)")
    parser.add_argument("--tiny", action="store_true", help="the tiny model on one core of this CPU instead")
    parser.add_argument("--repeats", type=int, default=15, help="of --tiny")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(arguments)
    if args.tiny:
        return tiny_main(args.repeats, args.json)
    unknown = [name for name in args.shapes.split(",") if name not in SHAPES]
    if unknown:
        parser.error(f"--shapes: {', '.join(unknown)} is none of {', '.join(SHAPES)}")
    if not torch.cuda.is_available():
        print("not measured: no GPU")
        return 0
    import triton

    results = {
        "benchmark": "calibration",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "commit": commit(),
        "rows": [],
    }
    for name in args.shapes.split(","):
        shape = SHAPES[name]
        row = {"shape": name, **measure(shape, min(args.heads or shape.heads, shape.heads), torch.device("cuda"))}
        print(_line(row), flush=True)
        results["rows"].append(row)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
