"""One real server process: patched and unpatched runs back to back, plans found again, and everything a user can get
wrong. A second server without the pack says what an unpatched run must be, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfyui_paro.paro_runtime.plan.file import file_digest
from comfyui_paro.scripts.comfy_server import ComfyError, ComfyServer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SMALL, OTHER = (5, 8, 10), (3, 9, 11)
SITES = 4  # blocks of the tiny model
SPARSE = {"preset": "custom", "density": 0.4, "precision": "int8", "dense_steps": 1, "min_tokens": 0}


def graph(
    grid: tuple[int, int, int], seed: int = 0, settings: dict | None = None, plan_file: str = "auto", **patch
) -> dict:
    """Three steps of the tiny model; with settings under PARO."""
    f, h, w = grid
    nodes = {
        "model": ("UNETLoader", {"unet_name": "tiny.safetensors", "weight_dtype": "default"}),
        "positive": ("TestPrompt", {"seed": 1}),
        "negative": ("TestPrompt", {"seed": 2}),
        "empty": (
            "EmptyHunyuanLatentVideo",
            {"width": 16 * w, "height": 16 * h, "length": 4 * f - 3, "batch_size": 1},
        ),
        "sample": (
            "KSampler",
            {
                **{name: [name, 0] for name in ("model", "positive", "negative")},
                **{"latent_image": ["empty", 0], "seed": seed, "steps": 3, "cfg": 2.0},
                **{"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
            },
        ),
        "save": ("SaveLatent", {"samples": ["sample", 0], "filename_prefix": "test"}),
    }
    if settings is not None:
        nodes["settings"] = ("PAROSettings", settings)
        inputs = {"model": ["model", 0], "enabled": True, "plan_file": plan_file, "settings": ["settings", 0], **patch}
        nodes["paro"] = ("PAROPatchModel", inputs)
        nodes["sample"][1]["model"] = ["paro", 0]
        nodes["report"] = ("PAROReport", {"model": ["paro", 0], "samples": ["sample", 0]})
        nodes["json"] = ("PreviewAny", {"source": ["report", 1]})
        nodes["picture"] = ("PreviewImage", {"images": ["report", 2]})
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def latent(server: ComfyServer, history: dict) -> bytes:
    """The sampled latent's bytes; the sampler must have run, not been remembered."""
    remembered = [data["nodes"] for kind, data in history["status"]["messages"] if kind == "execution_cached"]
    assert not any("sample" in nodes for nodes in remembered)
    (saved,) = history["outputs"]["save"]["latents"]
    file = server.folder / "output" / saved["subfolder"] / saved["filename"]
    return load_file(file)["latent_tensor"].numpy().tobytes()


def report(server: ComfyServer, history: dict) -> dict:
    return json.loads(server.text(history, "json"))


@pytest.fixture(scope="module")
def stock(stock_server) -> bytes:
    """What a server that never loaded the pack makes of the small clip."""
    return latent(stock_server, stock_server.run(graph(SMALL)))


def plans(server: ComfyServer) -> Path:
    return server.folder / "models" / "paro"


def clear(server: ComfyServer) -> None:
    for file in plans(server).glob("*.safetensors"):
        file.unlink()


def test_back_to_back(server, stock):
    """Unpatched runs stay bit-equal to stock around patched ones; a patched one gives what its seed gives, whatever ran
    before, and leaves no plan; where plans are to be remembered, the second run at a size finds its own."""
    clear(server)
    assert latent(server, server.run(graph(SMALL))) == stock
    first = server.run(graph(SMALL, settings=SPARSE))
    assert latent(server, first) != stock
    made = report(server, first)
    said = server.text(first, "report")
    assert said.startswith("2 of 3 steps sparse, attention error ") and "\n- 2 sparse and 1 dense steps\n" in said
    assert f"PARO: {said.splitlines()[0]}" in server.log.read_text(errors="replace")
    assert len(server.images(first, "report")) == len(server.images(first, "picture")) == 1
    assert made["plan_source"] == "calibrated on the way" and made["calibration_seconds"] > 0
    assert made["sites"] == made["sites_sparse"] == SITES and abs(made["density"] - 0.4) < 0.05
    assert not made["fallbacks"] and not made["passed"]
    other = report(server, server.run(graph(OTHER, seed=5, settings=SPARSE)))
    assert other["grid"] == list(OTHER) and other["sites_sparse"] == SITES
    assert latent(server, server.run(graph(SMALL))) == stock
    again = server.run(graph(SMALL, settings={**SPARSE, "verbose": True}))
    assert latent(server, again) == latent(server, first)
    assert report(server, again)["plan_source"] == "calibrated on the way" and not list(plans(server).glob("auto-*"))
    for seed, source in ((7, "calibrated on the way"), (8, "plan found")):
        kept = report(server, server.run(graph(SMALL, seed=seed, settings=SPARSE, plan_file="remembered")))
        assert kept["plan_source"] == source and (kept["calibration_seconds"] == 0) == (source == "plan found")
        assert kept["calls"] == {"sparse": 2 * SITES, "dense step": SITES}
    assert len(list(plans(server).glob("auto-*"))) == 1
    assert latent(server, server.run(graph(SMALL))) == stock
    off = graph(SMALL, settings=SPARSE, enabled=False)
    history = server.run(off)
    assert latent(server, history) == stock
    # No run, no picture: neither on the node nor for what waits for one, which does not run.
    assert server.text(history, "report").startswith("Not used: PARO is not on this model, or is switched off; ")
    assert report(server, history) == {"reason": server.text(history, "report")}
    assert not server.images(history) and "picture" not in history["outputs"]


def test_a_node_of_another_workflow_is_not_served_the_result_of_this_one(server):
    """What stands under a node goes to the number of the node that ran: a kept result would speak under another."""
    nodes = graph(SMALL, seed=12, settings=SPARSE)
    server.run(nodes)
    kinds = {"PAROSettings", "PAROPatchModel", "PAROReport"}
    renamed = {f"other_{name}" if node["class_type"] in kinds else name: node for name, node in nodes.items()}
    text = json.dumps(renamed)
    for name, node in nodes.items():
        if node["class_type"] in kinds:
            text = text.replace(f'["{name}", ', f'["other_{name}", ')
    history = server.run(json.loads(text))
    (kept,) = [data["nodes"] for kind, data in history["status"]["messages"] if kind == "execution_cached"]
    assert "model" in kept and not {name for name in kept if name.startswith("other_")}


def test_plan_file_from_another_machine(server):
    """Acceptance: the workflow names a plan that is not here; it runs, calibrates and says so."""
    clear(server)
    done = report(server, server.run(graph(SMALL, seed=11, settings=SPARSE, plan_file="theirs.safetensors")))
    assert done["plan_source"] == "calibrated on the way" and done["sites_sparse"] == SITES
    assert "theirs.safetensors is not in models/paro" in done["notes"][0]


def test_calibrate_node(server):
    """The plan goes down the wire and into a file; the node shows its picture."""
    nodes = graph(OTHER, seed=3, settings={**SPARSE, "density": 0.3})
    sampler = nodes["sample"]["inputs"]
    nodes["calibrate"] = {
        "class_type": "PAROCalibrate",
        "inputs": {**sampler, "model": ["model", 0], "calibrate_steps": "1-2", "plan_name": "mine"}
        | {"settings": ["settings", 0], "positive_2": ["negative", 0]},
    }
    nodes["paro"]["inputs"]["plan"] = ["calibrate", 0]
    history = server.run(nodes)
    assert report(server, history)["plan_source"] == "given plan"
    assert len(server.images(history, "calibrate")) == 1 and (plans(server) / "mine.safetensors").is_file()
    listed = server.json("/object_info/PAROPatchModel")["PAROPatchModel"]["input"]["required"]["plan_file"]
    assert "mine.safetensors" in str(listed)


def test_calibration_can_be_cancelled(server):
    """The page's cancel button during PARO Calibrate: the run ends as interrupted and nothing is saved."""
    clear(server)
    nodes = graph(OTHER, seed=4, settings=SPARSE)
    sampler = {**nodes["sample"]["inputs"], "steps": 500, "model": ["model", 0], "settings": ["settings", 0]}
    inputs = {**sampler, "calibrate_steps": "499", "plan_name": "cancelled"}
    calibrate = {key: nodes[key] for key in ("model", "positive", "negative", "empty", "settings")}
    calibrate["calibrate"] = {"class_type": "PAROCalibrate", "inputs": inputs}
    sent = []

    def cancel(seconds: float) -> None:
        if seconds > 1:
            sent.append(server.json("/interrupt", {}))

    with pytest.raises(ComfyError) as error:
        server.run(calibrate, waiting=cancel)
    kinds = [kind for kind, _ in error.value.details["status"]["messages"]]
    assert sent and "execution_interrupted" in kinds and "execution_error" not in kinds
    assert not list(plans(server).glob("*.safetensors"))


def change_plan(source: Path, target: Path, **changes) -> None:
    """A copy of a plan with tensors or header fields replaced, and a checksum to match."""
    with safe_open(source, framework="pt") as file:
        header = json.loads(file.metadata()["paro"])
    tensors = load_file(source)
    header.update({key: value for key, value in changes.items() if key in header})
    tensors.update({key: value for key, value in changes.items() if key in tensors})
    text = json.dumps(header)
    save_file(tensors, target, metadata={"paro": text, "paro_sha256": file_digest(text, tensors)})


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"density": 0}, "density"),
        ({"density": 1.5}, "density"),
        ({"mass_target": 1.5}, "mass_target"),
        ({"dense_blocks": "3-1"}, "dense_blocks: the range '3-1' does not rise"),
        ({"dense_steps": -2}, "dense_steps"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(server, settings, expected):
    with pytest.raises(ComfyError) as error:
        server.run(graph(SMALL, settings={**SPARSE, **settings}))
    assert expected in str(error.value) and "\n" not in str(error.value)
    # Only the input that is wrong is marked.
    (problems,) = (node["errors"] for node in error.value.details["node_errors"].values())
    assert {problem["extra_info"]["input_name"] for problem in problems} == set(settings)


def test_a_density_that_is_no_number_is_refused_by_the_node(server):
    with pytest.raises(ComfyError, match="density: nan"):
        server.run(graph(SMALL, settings={**SPARSE, "density": float("nan")}))


@pytest.mark.parametrize(
    "inputs, expected",
    [
        ({"calibrate_steps": "99"}, "calibrate_steps: there is no step 99; name steps from 0 to 2"),
        ({"calibrate_steps": "1, -4"}, "calibrate_steps: there is no step -4"),
        ({"plan_name": "../mine"}, "plan_name: '../mine' is not a plain file name"),
    ],
)
def test_what_calibrate_cannot_do_is_told_before_it_samples(server, inputs, expected):
    nodes = graph(OTHER, settings=SPARSE)
    calibrate = {key: nodes[key] for key in ("model", "positive", "negative", "empty", "settings")}
    common = {**nodes["sample"]["inputs"], "steps": 3, "model": ["model", 0], "settings": ["settings", 0]}
    calibrate["calibrate"] = {
        "class_type": "PAROCalibrate",
        "inputs": {**common, "calibrate_steps": "", "plan_name": "", **inputs},
    }
    with pytest.raises(ComfyError, match=expected):
        server.run(calibrate)


@pytest.mark.parametrize("settings", [{"preset": "turbo"}, {"precision": "int3"}])
def test_unknown_options_are_refused(server, settings):
    """By the host before anything runs, or, where old hosts do not look, by the node."""
    ((name, value),) = settings.items()
    with pytest.raises(ComfyError) as error:
        server.run(graph(SMALL, settings={**SPARSE, **settings}))
    assert f"{name}: '{value}'" in str(error.value) and "\n" not in str(error.value)
    assert {"preset": "balanced", "precision": "int4"}[name] in str(error.value)


def test_bad_plans_are_refused(server):
    """Truncated, not a plan, an order that does not exist, a path: refused before anything runs. Another model's plan:
    refused by the node. The server survives all of it."""
    clear(server)
    server.run(graph(SMALL, settings=SPARSE, plan_file="remembered"))
    good = next(plans(server).glob("auto-*"))
    (plans(server) / "truncated.safetensors").write_bytes(good.read_bytes()[:-100])
    (plans(server) / "garbage.safetensors").write_bytes(b"x" * 1000)
    heads = load_file(good)["0000.orders"]
    change_plan(good, plans(server) / "order.safetensors", **{"0000.orders": heads + 200})
    identity = {"family": "flux", "architecture": "0" * 16, "weights": "1" * 16}
    change_plan(good, plans(server) / "flux.safetensors", identity=identity)
    for name, expected in {
        "truncated.safetensors": "not a complete safetensors file",
        "garbage.safetensors": "not a complete safetensors file",
        "order.safetensors": "0000.orders holds 2",
        "../../secret": "is not a plain file name",
    }.items():
        with pytest.raises(ComfyError) as error:
            server.run(graph(SMALL, settings=SPARSE, plan_file=name))
        assert "plan_file: " in str(error.value) and expected in str(error.value)
        assert "\n" not in str(error.value) and "node_errors" in error.value.details
    with pytest.raises(ComfyError, match=r"plan: made for flux, the model is wan; choose a plan of this model"):
        server.run(graph(SMALL, settings=SPARSE, plan_file="flux.safetensors"))
    assert report(server, server.run(graph(SMALL, seed=99, settings=SPARSE)))["sites_sparse"] == SITES


def test_latent_smaller_than_a_block(server):
    history = server.run(graph((1, 4, 5), settings=SPARSE))
    small = report(server, history)
    assert small["sites"] == 0 and "do not fill two blocks" in small["passed"][0][0]
    assert server.text(history, "report").startswith("Not used: 20 grid tokens do not fill two blocks of 64; ")
    assert not server.images(history) and "picture" not in history["outputs"]
