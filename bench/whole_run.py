"""Whole samplings in a real ComfyUI: the host's attentions and PARO, from the first step to the finished latent.

python bench/whole_run.py --host COMFYUI [--cases wan14b-480p-20,flux-2048-8] [--whats dense,int8,sol_attn,sage,paro]
                          [--preset balanced] [--setting dense_attention=paro] [--parts off] [--json FILE]
python bench/whole_run.py --host COMFYUI --tiny --device cpu          every case at toy size, to try the program

Models have their real sizes and random weights (`bench/paro_bench/real_models.py`), which says nothing about quality.
Every case is a process of its own with an empty Triton cache, and everything of a case runs in that process: one dense
step to warm up, the host's attentions, then PARO four times: `first_ever` (its kernels are not compiled), `first` and
`second` (they are), and `remembered` (the plan of the first run is used). Results go into the file after every row;
a row that is run again replaces the one before. Speed-ups are over `dense` of the same process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import _checkout

ROOT = _checkout.register()

import torch  # noqa: E402
from comfyui_paro.bench.paro_bench import attentions, real_models  # noqa: E402
from comfyui_paro.bench.paro_bench.attentions import Unavailable  # noqa: E402
from comfyui_paro.bench.paro_bench.timeline import HostMemory, Timeline, hooked  # noqa: E402
from comfyui_paro.paro_runtime.config.settings import Settings  # noqa: E402

WHATS = ("dense", "int8", "sol_attn", "sage", "paro")
"""Also `sol_attn_tau`, the node's own default method, which keeps far fewer blocks than `sol_attn`."""
PARO_RUNS = ("first_ever", "first", "second", "remembered")
COMPILING_SECONDS = 120
UNFINISHED = "did not finish"


class Results:
    """The file of one GPU: a header and rows, of which there is one per case, attention and run."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        """Raises SystemExit if the file holds rows of another GPU, since a table must not mix them."""
        self.path = path
        rows = []
        if path is not None and path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["gpu"] != header["gpu"]:
                raise SystemExit(f"{path} holds rows of {before['gpu']}, this is {header['gpu']}: give another --json")
            rows = before["rows"]
        self.data = {**header, "rows": rows}

    def put(self, row: dict[str, Any]) -> None:
        rows = self.data["rows"]
        key = _key(row)
        at = next((i for i, other in enumerate(rows) if _key(other) == key), len(rows))
        rows[at : at + 1] = [{**row, "commit": self.data["commit"]}]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")

    def drop(self, rows: list[dict[str, Any]]) -> None:
        """Take out what is to be run now: what a crash leaves must not look measured."""
        for row in rows:
            self.put({**row, "error": UNFINISHED})


def _key(row: dict[str, Any]) -> tuple:
    return row["case"], row["attention"], row["run"]


class CaseRunner:
    """All rows of one case, in this process."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device, results: Results) -> None:
        self.name, self.args, self.device, self.results = name, args, device, results
        self.settings = Settings(preset=args.preset, **dict(args.setting)).validated()
        changes = [f"{name}={value}" for name, value in args.setting]
        self.paro = " ".join(["paro", *([args.preset] if args.preset != "balanced" else []), *changes])
        self.reference: torch.Tensor | None = None
        self.dense_seconds: float | None = None

    def planned(self) -> list[dict[str, Any]]:
        """The rows to come, dense first and PARO last: its first run must find no kernel compiled."""
        rows = [(what, None) for what in dict.fromkeys(["dense", *self.args.whats]) if what != "paro"]
        rows += [(self.paro, run) for run in PARO_RUNS] if "paro" in self.args.whats else []
        return [{"case": self.name, "attention": attention, "run": run} for attention, run in rows]

    def run(self) -> bool:
        """Measure every row; a failure is that row's `error` and does not stop the others. True: none but what cannot
        run here."""
        planned = self.planned()
        self.results.drop(planned)
        try:
            began = time.perf_counter()
            dtype = getattr(torch, self.args.dtype)
            self.loaded = real_models.load(real_models.RUNS[self.name], self.device, dtype, self.args.tiny)
            self._synchronise()
            size = sum(p.numel() for p in self.loaded.patchers[0].model.diffusion_model.parameters())
            print(f"{self.name}: {size / 1e9:.2f} B weights, {time.perf_counter() - began:.1f} s", flush=True)
            real_models.sample(self.loaded, self.loaded.patchers, lambda: None, warm_up=True)
        except Exception as error:
            for row in planned:
                self._report({**row, "error": _say(error)})
            return False
        good = True
        with tempfile.TemporaryDirectory(prefix="paro-plans-") as folder:
            for row in planned:
                try:
                    self._report({**row, **self._measure(row, Path(folder))})
                except Unavailable as error:
                    self._report({**row, "error": str(error)})
                except Exception as error:
                    good = False
                    self._report({**row, "error": _say(error)})
                self._free()
        return good

    def _measure(self, row: dict[str, Any], plans: Path) -> dict[str, Any]:
        from comfyui_paro.paro_runtime.compiling.ahead import wait_for_all
        from comfyui_paro.paro_runtime.host.patching import last_report, patch_model
        from comfyui_paro.paro_runtime.plan.store import PlanStore

        self._free()
        timeline = Timeline(self.device)
        parts = timeline if self.args.parts else None
        if row["run"] is None:
            models = [_host_attention(row["attention"], patcher, parts) for patcher in self.loaded.patchers]
        else:
            if row["run"] != "first_ever" and not wait_for_all(COMPILING_SECONDS):
                raise RuntimeError(f"kernels were not compiled within {COMPILING_SECONDS} s")
            # The first run keeps its plans for the one that is to find them; the others do as users' runs do.
            kept = {"store": PlanStore([], plans), "remember": row["run"] in ("first", "remembered")}
            models = [patch_model(p, self.settings, **kept) for p in self.loaded.patchers]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with hooked(timeline) if self.args.parts else nullcontext(), HostMemory() as memory:
            self._synchronise()
            began = time.perf_counter()
            timeline.begin()
            out = real_models.sample(self.loaded, models, timeline.step)
            timeline.end()
            seconds = time.perf_counter() - began
        if row["attention"] == "dense":
            self.reference, self.dense_seconds = out, seconds
        found = {
            "seconds": seconds,
            "speedup": None if self.dense_seconds is None else self.dense_seconds / seconds,
            "step_seconds": timeline.step_seconds(),
            "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None,
            "host_gb": memory.grown_gb,
            "host_files_gb": memory.of_files_gb,
            "parts": timeline.parts() if self.args.parts else None,
            "finite": bool(torch.isfinite(out).all()),
            "cosine": None if self.reference is None else _cosine(out, self.reference),
        }
        notes = [note for note in (self.loaded.run.note, real_models.MODELS[self.loaded.run.model].note) if note]
        if row["run"] is not None:
            found |= _of_reports([last_report(model) for model in models])
        return {**found, "notes": [*notes, *found.get("notes", [])]}

    def _report(self, row: dict[str, Any]) -> None:
        row = _rounded(row)
        self.results.put(row)
        print(json.dumps(row), flush=True)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _host_attention(name: str, patcher: Any, timeline: Timeline | None) -> Any:
    if name == "dense":
        return attentions.dense(patcher, timeline)
    if name in ("sol_attn", "sol_attn_tau"):
        return attentions.sol_attn(patcher, timeline, by_tau=name == "sol_attn_tau")
    return attentions.backend(patcher, timeline, {"int8": attentions.INT8}.get(name, name))


def _of_reports(reports: list[Any]) -> dict[str, Any]:
    """What PARO said of a run, its stages together."""
    strange = [report for report in reports if isinstance(report, str)]
    if strange:
        raise RuntimeError(strange[0])
    fallbacks = Counter()
    for report in reports:
        fallbacks.update(dict(report.fallbacks))
    return {
        "sites_sparse": sum(report.sites_sparse for report in reports),
        "sites": sum(report.sites for report in reports),
        "fallbacks": dict(fallbacks),
        "tokens": reports[0].tokens,
        "density": reports[0].density,
        "precision": reports[0].precision,
        "dense_steps": [report.dense_steps for report in reports],
        "plan_source": [report.plan_source for report in reports],
        "calls": [report.calls for report in reports],
        "passed": dict(reports[0].passed),
        "notes": list(dict.fromkeys(note for report in reports for note in report.notes)),
    }


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0))


def _say(error: Exception) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error)[:300]}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _slug(gpu: str) -> str:
    """`h100` of "NVIDIA H100 80GB HBM3", `geforce-rtx-4090` of "NVIDIA GeForce RTX 4090"."""
    words = [w for w in gpu.lower().split() if not re.fullmatch(r"nvidia|\d+gb|hbm\w*|pcie|sxm\w*", w)]
    return "-".join(words)


def _commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _setting(text: str) -> tuple[str, Any]:
    """("density", 0.2) of "density=0.2"; the kind of value is that of the field."""
    name, equals, value = text.partition("=")
    if not equals or name not in {f.name for f in fields(Settings)}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting and its value, such as density=0.2")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False}.get(value, value)


def _names(allowed: tuple[str, ...]) -> Any:
    def split(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(allowed)}")
        return names

    return split


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, required=True, help="a ComfyUI checkout")
    parser.add_argument("--cases", type=_names(tuple(real_models.RUNS)), default=list(real_models.RUNS))
    parser.add_argument("--case", choices=real_models.RUNS, help="one case, in this very process")
    parser.add_argument("--whats", type=_names((*WHATS, "sol_attn_tau")), default=list(WHATS))
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--setting", type=_setting, action="append", default=[], help="of PARO's, name=value")
    parser.add_argument("--parts", choices=("on", "off"), default="on", help="off: nothing is timed inside a run")
    parser.add_argument("--tiny", action="store_true", help="toy models")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--commit", default=None, help="where there is no .git")
    parser.add_argument("--json", type=Path, help="default: bench/results/whole_run_<gpu>.json, with --tiny none")
    args = parser.parse_args(argv)
    args.parts = args.parts == "on"
    return args


def run_case(args: argparse.Namespace) -> bool:
    """All rows of `args.case`."""
    device = torch.device(args.device)
    version = real_models.boot(args.host, device)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none, CPU"
    path = args.json
    if path is None and not args.tiny:
        path = ROOT / "bench" / "results" / f"whole_run_{_slug(gpu)}.json"
    header = {"benchmark": "whole_run", "gpu": gpu, "torch": torch.__version__, "triton": _triton()}
    header |= {"comfyui": version, "commit": args.commit or _commit(), "date": date.today().isoformat()}
    with tempfile.TemporaryDirectory(prefix="paro-triton-", ignore_cleanup_errors=True) as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with torch.inference_mode():  # as the host runs every node, loaders and samplers
            return CaseRunner(args.case, args, device, Results(path, {**header, "weights": "random"})).run()


def main() -> int:
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing is measured")
    if args.case:
        return 0 if run_case(args) else 1
    failed = []
    for name in args.cases:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--case", name])
        failed += [name] if done.returncode else []
    print(f"{len(args.cases)} cases, with errors: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
