"""Fidelity of PARO's masks, orders and tail, without anyone's model weights.

    python bench/fidelity.py --suite synthetic --seeds 5 --json bench/results/fidelity-synthetic.json
    python bench/fidelity.py --suite tiny --device cuda --json bench/results/fidelity-tiny.json
    python bench/fidelity.py --suite tiny --merge one.json two.json --json bench/results/fidelity-tiny.json
    python bench/fidelity.py --suite sta
    python bench/fidelity.py --suite seeds --seed 100 --seeds 64 --workers 16 --json bench/results/fidelity-seeds.json

Suites: `synthetic`, planted attention patterns; `tiny`, the tiny trained video model against its own dense run; `sta`,
windows published for HunyuanVideo; `seeds`, the presets on many clips of the tiny model. The
figures validate this implementation; they are not the quality of any model.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch

_spec = importlib.util.spec_from_file_location(
    "_checkout", Path(__file__).resolve().parent.parent / "scripts" / "_checkout.py"
)
_checkout = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_checkout)
_checkout.register()


def machine(device: str) -> dict:
    """What the figures were made on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def merged_machines(paths: list[Path]) -> dict:
    """What the figures of several files were made on, and by which commands."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    fields = ("device", "torch", "python", "date")
    made_on = {name: " and ".join(sorted({str(file.get(name)) for file in files})) for name in fields}
    return made_on | {"merged": [file.get("command") for file in files]}


def save(args: argparse.Namespace, records: list[dict], seconds: float | None = None) -> None:
    """Write what there is to the JSON file, if one was asked for: a long suite may be stopped."""
    if args.json:
        # Of paths only the names: where files lay says nothing to anybody else.
        words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
        content = {"suite": args.suite, "command": " ".join(words)}
        content |= merged_machines(args.merge) if args.merge else machine(args.device)
        content |= {"seconds": seconds, "records": records}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def run_synthetic(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Five seeds and four grids by default."""
    from comfyui_paro.bench.paro_bench.generator import LEVELS
    from comfyui_paro.bench.paro_bench.synthetic import GRIDS, run_case, table

    records = []
    for grid in GRIDS[: args.grids]:
        for seed in range(args.seed, args.seed + args.seeds):
            records += run_case(grid, LEVELS[args.level], seed, args.densities)
            print(f"grid {grid}, seed {seed} done", file=sys.stderr, flush=True)
            save(args, records)
    return records, table(records)


def run_sta(_: argparse.Namespace) -> tuple[list[dict], str]:
    """Query blocks of 64 and 128, axis orders, and tiled orders too."""
    from comfyui_paro.bench.paro_bench.sta import run, table

    records = [run(64), run(128), run(64, tiles=True)]
    return records, table(records)


def run_tiny(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Both grids: the table of orders, masks and tail; then calibration in passing against offline."""
    from comfyui_paro.bench.paro_bench.tiny import GRIDS, SEEDS, TinyBench, run_variants
    from comfyui_paro.bench.paro_bench.tiny_rows import acceptance, overview, passing_variants, standard_variants, table

    records = []
    for grid in GRIDS[: args.grids]:
        if args.grid and args.grid != "x".join(map(str, grid)):
            continue
        bench = TinyBench(grid, args.device, SEEDS[: args.videos])
        variants = standard_variants(args.densities, args.dense_steps) + passing_variants(args.densities)
        variants = [v for v in variants if re.search(args.only, v.name)]
        for variant in variants:
            records += run_variants(bench, [variant], lambda line: print(line, file=sys.stderr, flush=True))
            save(args, records)
    return records, f"{table(records)}\n\n{overview(records)}\n\n{acceptance(records)}"


def run_seeds(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Presets whose name matches `--only`, one clip after the other."""
    from comfyui_paro.bench.paro_bench.seeds import PRESETS, run, table

    seeds = range(args.seed, args.seed + args.seeds)
    presets = [name for name in PRESETS if re.search(args.only, name)]
    records = run(seeds, presets, args.precision, args.workers, args.sheet)
    return records, table(records)


def merge_tiny(args: argparse.Namespace) -> tuple[list[dict], str]:
    """Records of several runs of the suite `tiny`; of two of one variant the later file's counts."""
    from comfyui_paro.bench.paro_bench.tiny_rows import acceptance, overview, table

    found = {}
    for path in args.merge:
        for r in json.loads(path.read_text(encoding="utf-8"))["records"]:
            found[r["grid"], r["dense_steps"], r["density"], r["name"]] = r
    records = [found[key] for key in sorted(found)]
    return records, f"{table(records)}\n\n{overview(records)}\n\n{acceptance(records)}"


SUITES = {"synthetic": run_synthetic, "tiny": run_tiny, "sta": run_sta, "seeds": run_seeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="synthetic")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (synthetic, seeds)")
    parser.add_argument("--grids", type=int, default=4, help="how many of the suite's grids")
    parser.add_argument(
        "--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3], help="kept blocks / all blocks"
    )
    parser.add_argument("--dense-steps", type=int, nargs="+", default=[0, 3], help="of 8 (tiny)")
    parser.add_argument("--grid", default="", help="only this grid, such as 8x12x12 (tiny)")
    parser.add_argument("--videos", type=int, default=16, help="videos per variant (tiny)")
    parser.add_argument("--only", default="", help="only variants or presets whose name matches this (tiny, seeds)")
    parser.add_argument("--precision", default="int8", help="of the kernels (seeds)")
    parser.add_argument("--workers", type=int, default=2, help="processes (seeds)")
    parser.add_argument("--sheet", type=Path, help="write a PNG of the clips of balanced (seeds)")
    parser.add_argument("--level", choices=("easy", "hard"), default="hard", help="synthetic content")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="join the records of these files instead of running (tiny)"
    )
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    args = parser.parse_args()
    began = time.perf_counter()
    if args.merge and args.suite != "tiny":
        parser.error("--merge joins records of --suite tiny only")
    records, text = merge_tiny(args) if args.merge else SUITES[args.suite](args)
    print(text)
    save(args, records, round(time.perf_counter() - began, 1))


if __name__ == "__main__":
    main()
