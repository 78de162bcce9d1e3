"""Attention kernels at real shapes: correctness first, then time against the rivals in the same process.

python bench/attention.py [--shapes wan720p,flux] [--heads 8] [--precisions fp8,int8_pv8,int8,16bit]
                          [--densities 1,0.5,0.3,0.2,0.1] [--masks structured] [--rivals all] [--kernels triton]
                          [--json FILE]

Times are medians in milliseconds: `kernel` alone, `prepass` (reorder, smooth, quantise, pool), `total` as a caller sees
it. TFLOPS are effective: dense operations x kept blocks / time. Densities below 0.25 carry the tail. peak: MiB of one
call beyond its inputs, output included. On the CPU, in Triton's interpreter, only the errors mean something.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import _checkout

_checkout.register()

import torch  # noqa: E402
from comfyui_paro.bench.problems import SHAPES, Shape, exact_rows, inputs, pattern  # noqa: E402
from comfyui_paro.bench.rivals import RIVALS  # noqa: E402
from comfyui_paro.kernels.attention.api import sparse_attention  # noqa: E402
from comfyui_paro.kernels.attention.gluon_sm90 import launch as gluon_launch  # noqa: E402
from comfyui_paro.kernels.core.pattern import SparsePattern  # noqa: E402
from comfyui_paro.kernels.core.precision import PRECISIONS  # noqa: E402
from comfyui_paro.kernels.core.scratch import release_scratch  # noqa: E402
from comfyui_paro.paro_runtime.plan.options import query_block  # noqa: E402

TAIL_BELOW = 0.25
SAMPLED_ROWS = 192


def relative_error(out: torch.Tensor, q, k, v, p: SparsePattern) -> float:
    """Relative L2 against float32 on sampled rows of the first and last head."""
    rows = torch.linspace(0, q.shape[2] - 1, SAMPLED_ROWS, device=q.device).long()
    wrong = total = 0.0
    for head in (0, q.shape[1] - 1):
        exact = exact_rows(q, k, v, p, head, rows)
        wrong += (out[0, head, rows].float() - exact).square().sum().item()
        total += exact.square().sum().item()
    return (wrong / total) ** 0.5


def median_ms(run, device: torch.device) -> float:
    """Median time of one run in ms; on the CPU that of a single run."""
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    from triton.testing import do_bench

    return do_bench(run, warmup=40, rep=160, return_mode="median")


def dense_flops(shape: Shape, heads: int) -> float:
    """Multiply-adds counted as two operations, both products."""
    return 4.0 * heads * shape.length**2 * shape.dim


def peak_mib(run, device: torch.device) -> float | None:
    """MiB that one run takes beyond its inputs: output, scratch and whatever else; None on the CPU."""
    if device.type == "cpu":
        return None
    release_scratch()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def time_paro(shape, heads, q, k, v, p: SparsePattern, name: str) -> dict:
    """One row: error, kernel, pre-pass and total time, peak memory."""
    from comfyui_paro.kernels.attention.launch import forward, pieces_of, prepare

    precision = PRECISIONS[name]
    peak = peak_mib(lambda: sparse_attention(q, k, v, p, precision, backend="triton"), q.device)
    out = torch.full_like(q, float("nan"))
    sparse_attention(q, k, v, p, precision, out=out, backend="triton")
    error = relative_error(out, q, k, v, p)
    scale = shape.dim**-0.5
    total = median_ms(lambda: sparse_attention(q, k, v, p, precision, out=out, backend="triton"), q.device)
    kernel = prepass = 0.0
    pieces = pieces_of(q, k, v, out, p, precision)
    for piece in pieces:
        prepared = prepare(piece, p, scale)
        kernel += median_ms(lambda piece=piece, prepared=prepared: forward(piece, prepared, p, scale), q.device)
        prepass += median_ms(lambda piece=piece: prepare(piece, p, scale), q.device)
    call = pieces[0].call
    tile = call.tile
    steps = f"{'pairs' if tile.pairs else 'single'}, w{tile.warps} st{tile.stages}"
    return {
        "name": f"paro {name}",
        "tail": p.tail_bias is not None,
        "error": error,
        "kernel_ms": kernel,
        "prepass_ms": prepass,
        "total_ms": total,
        "tflops": dense_flops(shape, heads) * p.density / total / 1e9,
        "peak_mb": peak,
        "tile": f"gluon, {tile.rows} rows" if call.gluon else f"{tile.rows} rows, {steps}",
    }


def time_rivals(shape, heads, q, k, v, p: SparsePattern, names: list[str]) -> list[dict]:
    """A row per rival that this density is for; absent or failing ones say why."""
    rows = []
    for name in names:
        rival = RIVALS[name]
        if rival.sparse == (p.kept_words is None):
            continue
        row = {"name": name, "tail": False}
        try:
            run = rival.make(q, k, v, p)
            out = run()
            if rival.exact:
                row["error"] = relative_error(out, q, k, v, p)
            del out
            row["total_ms"] = median_ms(run, q.device)
            row["tflops"] = dense_flops(shape, heads) * p.density / row["total_ms"] / 1e9
            row["peak_mb"] = peak_mib(run, q.device)
        except Exception as error:  # a rival that is not installed, or does not take this shape, is named
            row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        rows.append(row)
    return rows


def commit() -> str:
    """The checkout's commit, or `unknown` outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="wan720p,wan480p,hunyuan15,ltx,flux,flux2048")
    parser.add_argument("--heads", type=int, default=8, help="heads at most: time is proportional to them")
    parser.add_argument("--precisions", default="fp8,int8_pv8,int8,16bit")
    parser.add_argument("--densities", default="1,0.5,0.3,0.2,0.1")
    parser.add_argument("--masks", default="structured", help="structured, random")
    parser.add_argument("--rivals", default="all")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script in Triton's interpreter")
    parser.add_argument("--kernels", default="auto", choices=["auto", "triton"], help="triton: no Gluon on sm_90")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing is measured")
    if args.kernels == "triton":
        gluon_launch.forbid("--kernels triton")
    import triton

    rivals = list(RIVALS) if args.rivals == "all" else [r for r in args.rivals.split(",") if r]
    results = {
        "benchmark": "attention",
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "CPU, interpreted: no speed",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "commit": commit(),
        "rows": [],
    }
    for shape_name in args.shapes.split(","):
        shape = SHAPES[shape_name]
        heads = min(args.heads, shape.heads)
        q, k, v = inputs(shape, heads, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
        for density in map(float, args.densities.split(",")):
            for kind in args.masks.split(",") if density < 1 else ["full"]:
                tail = density < TAIL_BELOW
                block_q = query_block(shape.length)
                p = pattern(shape, heads, density, kind, tail, q.device, block_q)
                rows = [time_paro(shape, heads, q, k, v, p, name) for name in args.precisions.split(",")]
                rows += time_rivals(shape, heads, q, k, v, p, rivals)
                for row in rows:
                    row |= {
                        "shape": shape_name,
                        "length": shape.length,
                        "heads": heads,
                        "dim": shape.dim,
                        "density": density,
                        "kept": p.density,
                        "mask": kind,
                        "block_q": block_q,
                    }
                    print(
                        json.dumps({a: round(b, 4) if isinstance(b, float) else b for a, b in row.items()}), flush=True
                    )
                results["rows"] += rows
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        del q, k, v
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
