"""What calibrating one site costs against the host's dense attention of that site, part by part, on a GPU.

python bench/calibration.py [--shapes wan720p,wan480p_small,flux] [--heads 8] [--json FILE]

Times are wall-clock medians in milliseconds that wait for the device. `observe` is what a calibrating step pays per
site: block sums of some rows under every order, the tail's errors and curves, copies to the CPU and all that lies
between. `refresh` measures the tail's bias again in a sparse step, `plan` makes the three masks of one site at the end;
`every_row` is what masks by mass would need instead of the tail. On a CPU nothing is measured.
"""

from __future__ import annotations

import argparse
import json
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
from comfyui_paro.bench.problems import SHAPES, Shape, inputs  # noqa: E402
from comfyui_paro.bench.rivals import RIVALS  # noqa: E402
from comfyui_paro.kernels.api import block_costs, block_statistics, row_logsumexp  # noqa: E402
from comfyui_paro.paro_runtime.calibration import Calibrator  # noqa: E402
from comfyui_paro.paro_runtime.orders import order_table  # noqa: E402
from comfyui_paro.paro_runtime.plan import ModelIdentity, Site  # noqa: E402
from comfyui_paro.paro_runtime.recipes import MaskOptions, query_block  # noqa: E402
from comfyui_paro.paro_runtime.refresh import ROWS_SHARE  # noqa: E402
from comfyui_paro.paro_runtime.selection import mass_kept_scores  # noqa: E402
from comfyui_paro.paro_runtime.statistics import StatisticsOptions, geometry_of, sampled_sums  # noqa: E402
from comfyui_paro.paro_runtime.tail import observe_bias, observe_tail, sampled_rows  # noqa: E402
from comfyui_paro.paro_runtime.tokens import TokenLayout  # noqa: E402

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

    def every_row():
        return block_statistics(q, k, row_logsumexp(q, k), g, rows)

    parts = {
        "orders": lambda: mass_kept_scores(sampled_sums(q, k, g, tables, None, {}), DENSITY),
        "costs": lambda: block_costs(q, k, v, g, rows, sampled_rows(g, device), pool=POOL),
        "tail": lambda: observe_tail(q, k, v, g, rows, density=DENSITY, pool=POOL),
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
    mask = plans[0].sites[SITE].mask(device, 1)

    def refresh():
        return observe_bias(q, k, v, g, rows, mask, pool=POOL, share=ROWS_SHARE)

    times["refresh_ms"] = median_ms(refresh, repeats, device)
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="wan720p,wan480p_small,flux", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--heads", type=int, help="heads at most (default: the model's)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(arguments)
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
        print(json.dumps({a: round(b, 4) if isinstance(b, float) else b for a, b in row.items()}), flush=True)
        results["rows"].append(row)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
