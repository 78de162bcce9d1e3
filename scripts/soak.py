"""Many runs of all kinds through one real ComfyUI server: nothing may fail, and nothing may pile up.

    python scripts/soak.py --minutes 20 [--runs N] [--seed N] [--host CHECKOUT] [--folder DIR] [--json FILE]

Sizes, settings, plans and prompts are drawn at random; runs are interrupted, plans damaged, taken away and named
wrongly, inputs are out of range. After a few runs each an unpatched one must give the same bits as the first. Memory is
the server's resident size, compared with what it was after WARM_UP runs. Ends with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _host import find_host, host_version
from comfy_server import ComfyError, ComfyServer

ROOT = Path(__file__).resolve().parent.parent
SIZES = ((4, 8, 8), (5, 8, 10), (3, 9, 11), (1, 16, 16), (2, 7, 13), (1, 4, 5), (8, 12, 12))
SAMPLERS = ("euler", "heun", "dpmpp_2m", "euler_ancestral")
WORDS = (("circle", "square", "cross"), ("right-down", "left-up", "right-up"), ("flat", "checker", "vertical"))
WARM_UP = 30
UNPATCHED_EVERY = 6
# What a user may get wrong, and what the answer must name.
WRONG = (
    ({"density": 7.0}, "density"),
    ({"dense_blocks": "9-2"}, "dense_blocks"),
    ({"precision": "int3"}, "precision"),
    ({"dense_steps": -5}, "dense_steps"),
)


@dataclass
class Tally:
    """What happened so far. failures: one line each."""

    runs: int = 0
    faults: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    sparse: int = 0
    unpatched: int = 0
    megabytes: list[float] = field(default_factory=list)

    def as_dict(self) -> dict:
        """JSON-ready; growth in MB since the warm-up, None where that was not reached or memory is not told."""
        later = self.megabytes[WARM_UP:]
        growth = round(max(later[-5:]) - later[0], 1) if len(later) > 5 and later[0] else None
        return {
            "runs": self.runs,
            "sparse_runs": self.sparse,
            "unpatched_runs": self.unpatched,
            "faults": dict(self.faults),
            "failures": self.failures,
            "growth_mb": growth,
            "server_mb": [round(value, 1) for value in self.megabytes[:: max(1, len(self.megabytes) // 50)]],
        }


def resident_megabytes(process: int) -> float:
    """Resident memory of a process; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def graph(
    size: tuple[int, int, int], seed: int, steps: int, sampler: str, words: tuple[str, str, str], settings: dict | None,
    plan_file: str,
) -> dict:  # fmt: skip
    """The tiny model's workflow; with settings under PARO."""
    f, h, w = size
    video = {"width": 16 * w, "height": 16 * h, "length": 4 * (f - 1) + 1, "batch_size": 1}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "load": ("PARODemoModel", {}),
        "prompt": ("PARODemoConditioning", dict(zip(("shape", "direction", "background"), words, strict=True))),
        "empty": ("EmptyHunyuanLatentVideo", video),
        "sample": (
            "KSampler",
            {
                **{"model": ["load", 0], "positive": ["prompt", 0], "negative": ["prompt", 1]},
                **{"latent_image": ["empty", 0], "seed": seed, "steps": steps, "cfg": 1.0, "denoise": 1.0},
                **{"sampler_name": sampler, "scheduler": "simple"},
            },
        ),
        "save": ("SaveLatent", {"samples": ["sample", 0], "filename_prefix": "soak"}),
    }
    if settings is not None:
        nodes["settings"] = ("PAROSettings", settings)
        patch = {"model": ["load", 0], "enabled": True, "plan_file": plan_file, "settings": ["settings", 0]}
        nodes["paro"] = ("PAROPatchModel", patch)
        nodes["sample"][1]["model"] = ["paro", 0]
        nodes["report"] = ("PAROReport", {"model": ["paro", 0], "samples": ["sample", 0]})
        # Saved: the report as JSON, whatever the node shows.
        nodes["told"] = ("PreviewAny", {"source": ["report", 1]})
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


class Soak:
    """One server and what is done to it."""

    def __init__(self, server: ComfyServer, seed: int) -> None:
        self.server, self.random, self.tally = server, random.Random(seed), Tally()
        self.plans = server.folder / "models" / "paro"
        self._first: dict[tuple[int, int, int], bytes] = {}

    def run_one(self) -> None:
        """One run of a kind drawn at random."""
        kinds = ["sparse"] * 8 + ["interrupt"] * 3 + ["wrong", "damaged plan", "missing plan", "no plan folder"]
        kind = "unpatched" if self.tally.runs % UNPATCHED_EVERY == 0 else self.random.choice(kinds)
        try:
            getattr(self, f"_{kind.replace(' ', '_')}")()
        except Exception as error:
            self.tally.failures.append(f"run {self.tally.runs} ({kind}): {type(error).__name__}: {error}")
        self.tally.runs += 1
        self.tally.megabytes.append(resident_megabytes(self.server.process_id))

    def _settings(self) -> dict:
        draw = self.random.choice
        return {
            "preset": "custom", "density": draw((0.1, 0.3, 0.6, 1.0)), "min_tokens": 0,
            "precision": draw(("auto", "int8", "fp8", "int4", "16bit")), "dense_steps": draw((-1, 0, 1, 2)),
            "order": draw(("mass", "original")), "tail": draw(("auto", "off")), "budget": draw(("shared", "per_head")),
            "dense_attention": draw(("auto", "host", "paro")), "mass_target": draw((0.0, 0.0, 0.9)),
        }  # fmt: skip

    def _graph(self, plan_file: str = "auto", settings: dict | None = None, steps: int | None = None) -> dict:
        draw = self.random.choice
        words = tuple(map(draw, WORDS))
        steps = draw((1, 3, 4)) if steps is None else steps
        return graph(
            draw(SIZES), draw(range(1000)), steps, draw(SAMPLERS), words, settings or self._settings(), plan_file
        )

    def _sparse(self, plan_file: str | None = None) -> None:
        plan = self.random.choice(("auto", "remembered")) if plan_file is None else plan_file
        history = self.server.run(self._graph(plan))
        made = json.loads(self.server.text(history, "told"))
        self.tally.sparse += made["sites_sparse"] > 0
        if made["fallbacks"]:
            raise AssertionError(f"fell back: {made['fallbacks']}")

    def _unpatched(self) -> None:
        size = self.random.choice(SIZES[:3])
        history = self.server.run(graph(size, 1, 2, "euler", ("circle", "right-down", "flat"), None, ""))
        messages = history["status"]["messages"]
        if any("sample" in data["nodes"] for kind, data in messages if kind == "execution_cached"):
            return  # the host remembered it from the run before
        self.tally.unpatched += 1
        (saved,) = history["outputs"]["save"]["latents"]
        bits = (self.server.folder / "output" / saved["subfolder"] / saved["filename"]).read_bytes()
        if bits != self._first.setdefault(size, bits):
            raise AssertionError(f"an unpatched run of {size} is not what it was at first")

    def _interrupt(self) -> None:
        self.tally.faults["interrupt"] += 1
        after, sent = self.random.uniform(0.2, 2.0), [0.0]

        def cancel(seconds: float) -> None:
            # Again every second: before the run has begun there is nothing to interrupt.
            if seconds > max(after, sent[-1] + 1):
                self.server.json("/interrupt", {})
                sent.append(seconds)

        try:
            self.server.run(self._graph(steps=400), waiting=cancel)
        except ComfyError as error:
            kinds = [kind for kind, _ in error.details["status"]["messages"]]
            if "execution_error" in kinds or "execution_interrupted" not in kinds:
                raise

    def _wrong(self) -> None:
        self.tally.faults["wrong input"] += 1
        change, named = self.random.choice(WRONG)
        try:
            self.server.run(self._graph(settings=self._settings() | change))
        except ComfyError as error:
            if named not in str(error):
                raise
        else:
            raise AssertionError(f"{change} was not refused")

    def _damaged_plan(self) -> None:
        self.tally.faults["damaged plan"] += 1
        for plan in self.plans.glob("*.safetensors"):
            content = bytearray(plan.read_bytes())
            for _ in range(3):
                content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            plan.write_bytes(content[: self.random.randrange(len(content))] if self.random.random() < 0.3 else content)
        self._sparse("remembered")
        for plan in self.plans.glob("*.safetensors"):
            plan.unlink()

    def _missing_plan(self) -> None:
        self.tally.faults["missing plan"] += 1
        self._sparse("not-here.safetensors")

    def _no_plan_folder(self) -> None:
        self.tally.faults["no plan folder"] += 1
        for plan in self.plans.glob("*"):
            if plan.is_file():
                plan.unlink()
        if self.plans.is_dir() and not any(self.plans.iterdir()):
            self.plans.rmdir()
        self._sparse("remembered")


def soak(host: Path, folder: Path, minutes: float, runs: int | None, seed: int, told=print) -> Tally:
    """Run until the time is over or so many runs are done."""
    with ComfyServer(host, ROOT, folder) as server:
        its, end = Soak(server, seed), time.monotonic() + 60 * minutes
        while time.monotonic() < end and (runs is None or its.tally.runs < runs):
            before = len(its.tally.failures)
            its.run_one()
            for line in its.tally.failures[before:]:
                told(line)
            if its.tally.runs % 25 == 0:
                told(f"{its.tally.runs} runs, {sum(its.tally.faults.values())} faults, "
                     f"{len(its.tally.failures)} failures, {its.tally.megabytes[-1]:.0f} MB")  # fmt: skip
    return its.tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--runs", type=int, help="end after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host", type=Path, help="a ComfyUI checkout; default: where the demo looks")
    parser.add_argument("--folder", type=Path, help="the server's own world; default: a temporary one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    host = arguments.host or find_host()
    if host is None:
        raise SystemExit("soak: no ComfyUI found; set COMFYUI_PATH")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        tally = soak(host, folder, arguments.minutes, arguments.runs, arguments.seed)
    found = {"comfyui": host_version(host), "seed": arguments.seed, **tally.as_dict()}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    growth = "growth not known" if found["growth_mb"] is None else f"grew by {found['growth_mb']} MB after the warm-up"
    print(f"{tally.runs} runs, {sum(tally.faults.values())} faults, {len(tally.failures)} failures, {growth}")
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
