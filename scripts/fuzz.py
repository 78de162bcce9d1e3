"""What strangers, disks and bugs may do to PARO, in great numbers: nothing of it may cost a generation.

    python scripts/fuzz.py [--prompts 5000] [--plans 10000] [--faults 100] [--seed N] [--host CHECKOUT] [--json FILE]

prompts  inputs of the nodes drawn from the wrong and the right, through the host's own validation and into the node;
         with every model that a node patches a short run is sampled, and its report read.
plans    plan files that were damaged or made to deceive.
faults   functions of PARO's own that raise, and memory that is out, at random moments of a short run.

Lost is a run that ends or is not finite; foreign is an exception that is not PARO's one sentence; accepted is a damaged
plan that is read as another than it was. Ends with 1 if there was any of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, register
from _host import find_host, host_version

HOSTILE = (
    *(None, True, -1, 0, 1, 3, 1 << 40, 1 << 70, 1e308, -0.0, 0.3, float("nan"), float("inf"), b"x", "", " ", "auto"),
    *(
        "nan",
        "0",
        "1e400",
        "7",
        "1, 2-3",
        "9-2",
        "-1-3",
        "0, 1, -1, 47-49",
        "-",
        ",",
        "²",
        "٣",
        "9" * 5000,
        "x" * 70000,
    ),
    *("custom", "remembered", "../../../etc/passwd", "/etc/passwd", "..", ".", "a\0b", "a\nb", "con", "nul", "é" * 130),
    *("C:\\x.safetensors", "\ud800", "稀疏", "$(id)", "x" * 70000, "p.safetensors", "broken.safetensors", "folder"),
    *([], [None], ["a"], ["a", "b", "c"], {}, {"__value__": 3}, {"a": []}),
)
ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, MemoryError)
LATENTS = ((1, 16, 3, 14, 18), (1, 16, 14, 18), (0, 16, 3, 14, 18), (), (5,), (1, 16, 3, 0, 18), (2, 3, 4, 5, 6, 7))
GRID = (3, 7, 9)
SPARSE = {"preset": "custom", "density": 0.4, "dense_steps": 1, "backend": "reference", "strict": False}
# The host's errors of inputs that were left out, which are put in afterwards.
MISSING = "required_input_missing"
# These sample by themselves or take long to look at a machine: their inputs are checked, one in so many is run.
SELDOM = {"PAROCalibrate": 40, "PAROCompare": 40, "PAROCheck": 100}
PATCHING = 6  # PARO Patch Model comes so many times as often as another node
# Of the runs: the second size is too small for PARO, the third is no video's.
GRIDS = (GRID, (1, 5, 6), (1, 12, 11), (5, 6, 8))
SAMPLERS = ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm", "ddim")
SCHEDULERS = ("simple", "karras", "sgm_uniform", "beta")
# Functions that are the guard itself, or are the host's own call passing through.
GUARDS = {"Lifecycle.outer_sample", "Lifecycle.apply_model", "Lifecycle._begin", "Lifecycle._end", "Lifecycle._finish",
          "Lifecycle._lost", "Lifecycle._stop", "Lifecycle._conclude", "Lifecycle._or", "Lifecycle._no_report",
          "HostEvaluation.trouble", "RunLog.log_once",
          "make_override.<locals>.paro_attention", "make_override.<locals>.paro_attention.<locals>.dense", "_attend",
          "_attend.<locals>.host", "run_host", "_ours", "options_of", "one_line",
          "_next_to_the_model", "Lifecycle.apply_model.<locals>.<dictcomp>"}  # fmt: skip


class Found:
    """Counts, and one line for each kind of what must not be."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.kinds: dict[str, str] = {}

    def wrong(self, what: str, where: str, error: BaseException | None = None, about: Any = None) -> None:
        """what: lost, foreign or accepted."""
        self.counts[what] += 1
        own = (
            [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))] if error else []
        )
        line = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        said = "" if error is None else f"{type(error).__name__}: {str(error).splitlines()[:1]}"
        self.kinds.setdefault(f"{what} {where} {line} {said}"[:300], repr(about)[:300])


def one_sentence(error: BaseException) -> bool:
    """Whether an error is what PARO tells a user: a ValueError of Python's own, in one line of usual length."""
    text = str(error)
    return type(error) is ValueError and bool(text) and "\n" not in text and len(text) < 500


class Prompts:
    """Nodes with inputs at random. Needs the booted host."""

    def __init__(self, tiny: Any, wan: Any, chance: random.Random, found: Found, foreign: Any, folder: Path) -> None:
        """foreign: a plan of another model; folder: where plans are kept."""
        import execution
        import torch
        from comfyui_paro.nodes.extension import PAROExtension
        from comfyui_paro.paro_runtime.plan.store import PlanStore

        import nodes

        self.validate, self.classes = execution.validate_inputs, nodes.NODE_CLASS_MAPPINGS
        self.names = []
        for node in asyncio.run(PAROExtension().get_node_list()):
            self.names.append(node.GET_SCHEMA().node_id)
            self.classes[self.names[-1]] = node
        self.tiny, self.wan, self.chance, self.found = tiny, wan, chance, found
        self.settings: list[Any] = [None]
        self.hostile = 0.0  # share of the values that are drawn from HOSTILE
        store = PlanStore([], folder)
        with torch.inference_mode():
            tiny.sample(tiny.patched(wan, store=store, **SPARSE), GRID, steps=3, cfg=1.0)
        (own,) = (store.load(name) for name in store.names() if name.startswith("auto-"))
        self.plans = (foreign, own)
        self.models = (wan, wan, wan, tiny.patched(wan, **SPARSE))

    def run(self, count: int) -> None:
        """So many nodes, each once."""
        weights = [PATCHING if name == "PAROPatchModel" else 1 for name in self.names]
        for name in self.chance.choices(self.names, weights, k=count):
            self.hostile = self.chance.choice((0.02, 0.25))
            node = self.classes[name]
            inputs = {each.id: self._widget(each) for each in node.GET_SCHEMA().inputs if hasattr(each, "default")}
            inputs = {key: value for key, value in inputs.items() if self.chance.random() < 0.9}
            prompt = {"1": {"class_type": name, "inputs": inputs}}
            self.found.counts["prompts"] += 1
            try:
                _, errors, _ = asyncio.run(self.validate("fuzz", prompt, "1", {}))
            except Exception as error:
                # A value that the host's own check fails on never reaches a node.
                own = any(f.filename.startswith(str(ROOT / "nodes")) for f in traceback.extract_tb(error.__traceback__))
                self.found.counts["refused by an error of the host's"] += not own
                if own:
                    self.found.wrong("foreign", f"{name} checked", error, inputs)
                continue
            if any(each["type"] != MISSING for each in errors):
                self.found.counts["refused before the run"] += 1
            elif self.chance.randrange(SELDOM.get(name, 1)) == 0:
                self._execute(name, node, prompt["1"]["inputs"])

    def _widget(self, each: Any) -> Any:
        options = getattr(each, "options", None)
        if self.chance.random() >= self.hostile:
            return self.chance.choice(options) if options else each.default
        return self.chance.choice(HOSTILE)

    def _execute(self, name: str, node: Any, inputs: dict[str, Any]) -> None:
        for each in node.GET_SCHEMA().inputs:
            if not hasattr(each, "default") and (not each.optional or self.chance.random() < 0.5):
                inputs[each.id] = self._socket(each.id)
            elif each.id not in inputs and not each.optional:
                inputs[each.id] = each.default if each.default is not None else each.options[0]
        try:
            clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
            made = clone.EXECUTE_NORMALIZED(**inputs)
        except Exception as error:
            own = one_sentence(error)
            self.found.counts["refused in one sentence"] += own
            if not own:
                self.found.wrong("foreign", f"{name} run", error, inputs)
            return
        self.found.counts["taken"] += 1
        if name == "PAROSettings":
            self.settings = [*self.settings[-20:], made.args[0]]
        elif name == "PAROPatchModel":
            self._sample(made.args[0], inputs)

    def _socket(self, name: str) -> Any:
        import torch

        if name in ("model", "other"):
            return self.chance.choice(self.models)
        if name in ("latent", "latent_image", "samples"):
            return {"samples": torch.zeros(self.chance.choice(LATENTS) if name != "latent_image" else LATENTS[0])}
        if name == "settings":
            return self.chance.choice(self.settings)
        given = {
            "plan": self.chance.choice(self.plans),
            "sigmas": torch.tensor(self.chance.choice(([1.0, 0.5, 0.0], [], [float("nan")] * 3))),
        }
        return given[name] if name in given else None if name == "vae" else self.tiny.text(1)

    def _sample(self, model: Any, inputs: dict[str, Any]) -> None:
        """A short run, and what PARO Report says of it."""
        self.found.counts["sampled"] += 1
        drawn = {"steps": self.chance.choice((1, 2, 2, 3)), "cfg": self.chance.choice((1.0, 1.0, 3.0))}
        drawn |= {"sampler": self.chance.choice(SAMPLERS), "scheduler": self.chance.choice(SCHEDULERS)}
        drawn |= {"batch": self.chance.choice((1, 1, 2)), "grid": self.chance.choice(GRIDS)}
        about = {**inputs, **drawn}
        try:
            out = self.tiny.sample(model, **drawn)
            report = self.classes["PAROReport"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
            told = report.EXECUTE_NORMALIZED(model=model, samples={"samples": out}).args
        except Exception as error:
            if not getattr(inputs.get("settings"), "strict", False):
                self.found.wrong("lost", "prompt", error, about)
            return
        if not out.isfinite().all():
            self.found.wrong("lost", "prompt: not finite", None, about)
        if told[0].startswith("The report cannot be shown"):
            self.found.wrong("lost", f"report: {told[0]}", None, about)
        calls = json.loads(told[1]).get("calls", {})
        self.found.counts["sampled with sparse calls"] += calls.get("sparse", 0) > 0


def mutated_plans(count: int, chance: random.Random, found: Found, folder: Path) -> None:
    """Read so many damaged files."""
    from comfyui_paro.paro_runtime.plan.file import load_plan, save_plan
    from comfyui_paro.paro_runtime.plan.plan import PlanError
    from comfyui_paro.tests.mutated_plans import make_plan, mutate, same, without_masks

    path = folder / "p.safetensors"
    for plan in (make_plan(), without_masks(make_plan())):
        save_plan(plan, path)
        data = path.read_bytes()
        for _ in range(count // 2):
            path.write_bytes(mutate(data, chance))
            found.counts["plans"] += 1
            try:
                unlike = not same(load_plan(path), plan)
            except PlanError as error:
                found.counts["plans refused"] += 1
                if "\n" in str(error) or len(str(error)) > 400:
                    found.wrong("foreign", "plan: no one line", error)
            except Exception as error:
                found.wrong("foreign", "plan", error)
            else:
                if unlike:
                    found.wrong("accepted", "plan")


def faults(count: int, chance: random.Random, found: Found, tiny: Any, wan: Any, host: Path) -> None:
    """So many short runs, half of them with a function that raises, half without memory at some moment."""
    from comfyui_paro.paro_runtime.compiling import self_check
    from comfyui_paro.tests.allocations import forget_everything
    from comfyui_paro.tests.host.failing import OutOfMemory, Raising

    def run(fault: Any) -> None:
        forget_everything()
        self_check._checked.clear()
        model = tiny.patched(wan, **SPARSE)
        with fault:
            out = tiny.sample(model, GRID, steps=3, cfg=1.0)
        if not out.isfinite().all():
            raise FloatingPointError("the result is not finite")

    counted, memory = Raising(), OutOfMemory("cpu", host)
    run(memory)
    run(counted)
    places = sorted(place for place in counted.calls if place[1] not in GUARDS)
    moments = memory.first_of_each_place(1 << 30)
    for number in range(count):
        if number % 2:
            moment = chance.choice(moments)
            where, fault = f"no memory at {memory.places[moment]}", OutOfMemory("cpu", host, range(moment, moment + 1))
        else:
            place = chance.choice(places)
            kind, where = chance.choice(ERRORS), f"{place[0]} {place[1]}"
            fault = Raising(kind("a fault that was put here"), place, chance.randrange(counted.calls[place]))
        found.counts["faults"] += 1
        try:
            run(fault)
        except Exception as error:
            found.wrong("lost", where, error)
        found.counts["faults met"] += fault.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("prompts", 5000), ("plans", 10000), ("faults", 100), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--host", type=Path, help="a ComfyUI checkout; default: where the demo looks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    host = arguments.host or find_host()
    if host is None:
        raise SystemExit("fuzz: no ComfyUI found; set COMFYUI_PATH")
    from comfy_boot import boot

    register()
    boot(host)
    logging.disable(logging.CRITICAL)
    import comfy.utils
    import folder_paths
    from comfyui_paro.nodes.storage import FOLDER
    from comfyui_paro.paro_runtime.plan.file import save_plan
    from comfyui_paro.tests.host import tiny
    from comfyui_paro.tests.mutated_plans import make_plan

    comfy.utils.PROGRESS_BAR_ENABLED = False
    chance, found = random.Random(arguments.seed), Found()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder_paths.set_temp_directory(temporary)
        wan, plans = tiny.load(tiny.build_wan(folder / "wan.safetensors")), folder / "paro"
        save_plan(make_plan(), plans / "p.safetensors")
        (plans / "broken.safetensors").write_bytes(b"\0" * 30)
        (plans / "folder.safetensors").mkdir()
        mutated_plans(arguments.plans, chance, found, folder)
        faults(arguments.faults, chance, found, tiny, wan, host)
        prompts = Prompts(tiny, wan, chance, found, make_plan(), plans)
        # After the nodes registered the user's own: nothing is read or written there.
        folder_paths.folder_names_and_paths[FOLDER][0][:] = [str(plans)]
        prompts.run(arguments.prompts)
    wrong = {kind: found.counts[kind] for kind in ("lost", "foreign", "accepted")}
    told = {"comfyui": host_version(host), "seed": arguments.seed, **found.counts, **wrong}
    if arguments.json:
        arguments.json.write_text(json.dumps({**told, "kinds": found.kinds}, indent=1) + "\n", encoding="utf-8")
    for kind, example in found.kinds.items():
        print(f"{kind}\n    {example}")
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
