"""The mistakes of docs/troubleshooting.md, each as a prompt for a real server. What is read back is in the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfyui_paro.tests.host.test_server import SMALL, SPARSE, graph

TINY = (1, 4, 5)


@dataclass(frozen=True)
class Mistake:
    """prompt: in API format, node names in place of numbers.

    marks: the inputs that the page marks, of a prompt that is refused. fails: the node that ends the run. Neither: the
    run goes on, and `report` tells.
    """

    prompt: dict[str, Any]
    marks: tuple[str, ...] = ()
    fails: str = ""


def sampled(seed: int = 41, *, grid: tuple[int, int, int] = SMALL, change: dict | None = None, **given: Any) -> dict:
    """Settings, PARO Patch Model, sampler and report; change: inputs by node."""
    nodes = graph(grid, seed=seed, settings={**SPARSE, **given.pop("settings", {})}, **given)
    for name, inputs in (change or {}).items():
        nodes[name]["inputs"] |= inputs
    return nodes


def bare(**patch: Any) -> dict:
    """Without PARO Settings."""
    nodes = sampled(**patch)
    del nodes["settings"], nodes["paro"]["inputs"]["settings"]
    return nodes


def calibrating(grid: tuple[int, int, int] = SMALL, model: str = "model", **inputs: Any) -> dict:
    """PARO Calibrate and what it hangs on."""
    nodes = graph(grid, settings=SPARSE)
    kept = {key: nodes[key] for key in ("model", "positive", "negative", "empty", "settings")} | others(model)
    common = {**nodes["sample"]["inputs"], "model": [model, 0], "settings": ["settings", 0]}
    given = {**common, "calibrate_steps": "1-2", "plan_name": "tried", **inputs}
    return {**kept, "calibrate": {"class_type": "PAROCalibrate", "inputs": given}}


def comparing(patched: bool = True, vae: str = "PARODemoVAE", model: str = "model") -> dict:
    """PARO Compare in the sampler's place."""
    nodes = graph(SMALL, settings=SPARSE)
    nodes["paro"]["inputs"]["model"] = [model, 0]
    kept = {key: nodes[key] for key in ("model", "positive", "negative", "empty", "settings", "paro")} | others(model)
    inputs = {**nodes["sample"]["inputs"], "model": ["paro" if patched else "model", 0], "vae": ["vae", 0]}
    kept["vae"] = {"class_type": vae, "inputs": {}}
    return {**kept, "compare": {"class_type": "PAROCompare", "inputs": inputs}}


def others(model: str) -> dict:
    other = {"class_type": "TestOtherModel", "inputs": {"model": ["model", 0]}}
    return {"other": other} if model == "other" else {}


def without(nodes: dict, node: str, name: str) -> dict:
    del nodes[node]["inputs"][name]
    return nodes


def twice() -> dict:
    nodes = sampled()
    nodes["second"] = {"class_type": "PAROPatchModel", "inputs": {**nodes["paro"]["inputs"], "model": ["paro", 0]}}
    for name in ("sample", "report"):
        nodes[name]["inputs"]["model"] = ["second", 0]
    return nodes


def early() -> dict:
    """A report of a model that nothing was sampled with."""
    nodes = sampled(settings={"density": 0.37})
    for name in ("sample", "save", "picture"):
        del nodes[name]
    nodes["report"]["inputs"]["samples"] = ["empty", 0]
    return nodes


def unknown() -> dict:
    nodes = early()
    nodes["other"] = others("other")["other"]
    nodes["paro"]["inputs"]["model"] = ["other", 0]
    return nodes


SETTINGS = {
    "`density` 0 in PARO Settings": ({"density": 0}, "density"),
    "`density` 1.5": ({"density": 1.5}, "density"),
    "`density` that is a word": ({"density": "little"}, "density"),
    "`mass_target` 1.5": ({"mass_target": 1.5}, "mass_target"),
    "`dense_steps` -2": ({"dense_steps": -2}, "dense_steps"),
    "`dense_blocks` 3-1": ({"dense_blocks": "3-1"}, "dense_blocks"),
    "`dense_blocks` -3--1": ({"dense_blocks": "-3--1"}, "dense_blocks"),
    "`dense_blocks` in words": ({"dense_blocks": "first two"}, "dense_blocks"),
    "`preset` turbo, as another version may have it": ({"preset": "turbo"}, "preset"),
}
PLANS = {
    "`plan_file`: half of a file": "half.safetensors",
    "`plan_file`: a model instead of a plan": "model.safetensors",
    "`plan_file`: a plan of a later version": "later.safetensors",
    "`plan_file`: one byte is not as it was": "changed.safetensors",
    "`plan_file` with a path": "../../theirs",
}
REFUSED = {
    **{row: Mistake(sampled(settings=given), marks=(name,)) for row, (given, name) in SETTINGS.items()},
    **{row: Mistake(sampled(plan_file=name), marks=("plan_file",)) for row, name in PLANS.items()},
    "`calibrate_steps` in words": Mistake(calibrating(calibrate_steps="all"), marks=("calibrate_steps",)),
    "PARO Patch Model without a model": Mistake(without(sampled(), "paro", "model"), marks=("model",)),
    "PARO Compare without a latent": Mistake(without(comparing(), "compare", "latent_image"), marks=("latent_image",)),
    "PARO Calibrate without a prompt": Mistake(without(calibrating(), "calibrate", "positive"), marks=("positive",)),
    "PARO Settings into the model input": Mistake(
        sampled(change={"paro": {"model": ["settings", 0]}}), marks=("model",)
    ),
    "PARO Settings alone, connected to nothing": Mistake({"settings": sampled()["settings"]}),
}
FAILED = {
    "`density` that is not a number (NaN)": Mistake(sampled(settings={"density": float("nan")}), fails="settings"),
    "`plan_file`: a plan of another family": Mistake(sampled(plan_file="flux.safetensors"), fails="paro"),
    "`plan_file`: a plan of another size of the model": Mistake(sampled(plan_file="large.safetensors"), fails="paro"),
    "`calibrate_steps` 99 of 3": Mistake(calibrating(calibrate_steps="99"), fails="calibrate"),
    "`plan_name` with a path": Mistake(calibrating(plan_name="../mine"), fails="calibrate"),
    "`plan_name` too long for a file": Mistake(calibrating(plan_name=130 * "é"), fails="calibrate"),
    "PARO Calibrate at a size too small": Mistake(calibrating(TINY), fails="calibrate"),
    "PARO Calibrate with a model PARO does not know": Mistake(calibrating(model="other"), fails="calibrate"),
    "PARO Compare without PARO on the model": Mistake(comparing(patched=False), fails="compare"),
    "PARO Compare with a model PARO does not know": Mistake(comparing(model="other"), fails="compare"),
    "PARO Compare with an empty VAE": Mistake(comparing(vae="TestNoVae"), fails="compare"),
    "`strict` without a plan and `calibrate` off": Mistake(
        sampled(settings={"strict": True, "calibrate": False}), fails="sample"
    ),
}
TOLD = {
    "`dense_steps` 20 of 3": sampled(settings={"dense_steps": 20}),
    "`dense_blocks` 90-95 of 4 blocks": sampled(settings={"dense_blocks": "90-95"}),
    "`calibrate` off, and no plan": sampled(settings={"calibrate": False}),
    "`density` without the speed custom": bare(density=0.2),
    "`speed` with PARO Settings connected": sampled(speed="fast"),
    "`plan_file` of another machine": sampled(plan_file="theirs.safetensors"),
    "`plan_file`: a plan of other weights": sampled(plan_file="weights.safetensors"),
    "two PARO Patch Model in a row": twice(),
    "PARO Report before anything was sampled": early(),
    "`enabled` off": sampled(enabled=False),
    "a size too small": sampled(grid=TINY),
    "a model PARO does not know": unknown(),
}
MISTAKES = {**REFUSED, **FAILED, **{row: Mistake(prompt) for row, prompt in TOLD.items()}}
