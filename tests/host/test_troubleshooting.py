"""Every mistake of docs/troubleshooting.md is made, and what the user is told is what stands in its table."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from comfyui_paro.kernels.core import support
from comfyui_paro.paro_runtime.plan.file import load_plan, save_plan
from comfyui_paro.scripts.comfy_server import ComfyError
from comfyui_paro.tests.host.mistakes import FAILED, MISTAKES, REFUSED, TOLD
from comfyui_paro.tests.host.test_server import OTHER, SPARSE, change_plan, clear, graph, plans
from safetensors.torch import load_file, save_file

PACK = Path(__file__).resolve().parent.parent.parent
PAGE = PACK / "docs" / "troubleshooting.md"
TITLE = "## Mistakes, and what you are told"
MACHINE = {
    "no Triton": {"backend": "triton"},
    "`backend` triton without a GPU": {"backend": "triton"},
    "a GPU before Ampere": {"backend": "triton"},
    "`precision` fp8 on an Ampere GPU": {"backend": "triton", "precision": "fp8"},
}
"""Settings of the mistakes that hang on the machine: it is made up."""
FOLDER = "a folder of plans that may not be read"


def table() -> dict[str, str]:
    """What was done -> the sentence that is shown, `…` for what is not always the same."""
    text = PAGE.read_text(encoding="utf-8").split(TITLE)[1]
    _, _, *rows = (re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if line.startswith("| "))
    found = {done: sentence.strip("`") for done, sentence, _ in rows}
    assert len(found) == len(rows), "a mistake stands there twice"
    return found


def fits(row: str, said: str) -> bool:
    """Whether the whole of what was said is what the table says."""
    pattern = ".*".join(map(re.escape, table()[row].split("…")))
    return re.fullmatch(pattern, said) is not None


@pytest.fixture(scope="module")
def files(server) -> None:
    """Plans that cannot be used, each for a reason of its own."""
    clear(server)
    folder = plans(server)
    server.run(graph(OTHER, settings=SPARSE, plan_file="remembered"))
    (good,) = folder.glob("auto-*")
    whole = good.read_bytes()
    (folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "changed.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    save_file({"weight": load_file(good)["0000.density"]}, folder / "model.safetensors")
    change_plan(good, folder / "later.safetensors", format=99)
    identity = {"family": "flux", "architecture": "0" * 16, "weights": "1" * 16}
    change_plan(good, folder / "flux.safetensors", identity=identity)
    change_plan(good, folder / "large.safetensors", identity={**identity, "family": "wan"})
    _changed(good, folder)
    good.unlink()


def _changed(good: Path, folder: Path) -> None:
    """A plan of a fine-tune of this model, which can be read."""
    plan = load_plan(good)
    save_plan(replace(plan, identity=replace(plan.identity, weights="1" * 16)), folder / "weights.safetensors")


def test_the_table_is_of_what_is_tried():
    rows = {*REFUSED, *FAILED, *TOLD, *MACHINE, FOLDER}
    assert set(table()) == rows and len(rows) >= 30
    assert all(len(sentence) < 200 and "\n" not in sentence for sentence in table().values())


@pytest.mark.parametrize("row", REFUSED)
def test_refused_before_anything_runs(server, files, row):
    mistake = REFUSED[row]
    with pytest.raises(ComfyError) as error:
        server.run(mistake.prompt)
    answer = error.value.details
    problems = [problem for node in answer["node_errors"].values() for problem in node["errors"]]
    assert tuple(problem["extra_info"]["input_name"] for problem in problems) == mistake.marks
    if not problems:
        assert fits(row, answer["error"]["message"]), answer["error"]
        return
    (problem,) = problems
    said = problem["message"]
    if problem["type"] == "custom_validation_failed":
        said = problem["details"].removeprefix(f"{mistake.marks[0]} - ")
    assert fits(row, said), said


@pytest.mark.parametrize("row", FAILED)
def test_refused_by_the_node(server, files, row):
    mistake = FAILED[row]
    with pytest.raises(ComfyError) as error:
        server.run(mistake.prompt)
    (data,) = [data for kind, data in error.value.details["status"]["messages"] if kind == "execution_error"]
    said = data["exception_message"].strip()
    assert data["node_id"] == mistake.fails and fits(row, said), said
    assert data["exception_type"] in ("ValueError", "RuntimeError")


@pytest.mark.parametrize("row", TOLD)
def test_told_by_a_run_that_goes_on(server, files, row):
    history = server.run(TOLD[row])
    lines = [line.removeprefix("- ") for line in server.text(history, "report").splitlines()]
    assert any(fits(row, line) for line in lines), lines


@pytest.mark.host_on_cpu
@pytest.mark.parametrize("row", MACHINE)
def test_told_on_another_machine(comfy, wan, monkeypatch, row):
    find = importlib.util.find_spec
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if row == "no Triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    elif "GPU before" in row or "Ampere" in row:
        monkeypatch.setattr(support, "_compile_for", (7, 5) if "before" in row else (8, 6))
    said = []
    comfy.sample(comfy.patched(wan, said=said, strict=False, **MACHINE[row]), (5, 7, 9))
    assert fits(row, said[-1].partition(" · ")[0]), said[-1]


@pytest.mark.host_on_cpu
def test_a_folder_that_may_not_be_read(comfy, store, monkeypatch):
    from comfyui_paro.nodes import patch_model, storage

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "plan_store", lambda: store)
    monkeypatch.setattr(Path, "is_file", forbidden)
    with pytest.raises(ValueError) as error:
        patch_model._load("mine.safetensors", to_check=True)
    assert fits(FOLDER, str(error.value)), str(error.value)


SEEN = (
    "`dense_blocks` 3-1",
    "`dense_blocks` in words",
    "`plan_file`: half of a file",
    "`plan_file` with a path",
    "`calibrate_steps` in words",
    "`plan_file`: a plan of another family",
    "`calibrate_steps` 99 of 3",
    "`plan_name` with a path",
    "PARO Compare without PARO on the model",
    "`density` without the speed custom",
    "a size too small",
)
"""Mistakes that are made in the page as well, and read from it."""


def numbered(prompt: dict) -> dict:
    """Nodes with numbers, as the page has them."""
    numbers = {name: str(number) for number, name in enumerate(prompt, 1)}

    def renamed(value):
        return [numbers[value[0]], value[1]] if isinstance(value, list) else value

    return {
        numbers[name]: {**node, "inputs": {key: renamed(value) for key, value in node["inputs"].items()}}
        for name, node in prompt.items()
    }


@pytest.fixture(scope="module")
def told(page, files, tmp_path_factory) -> dict:
    """What the page said to each mistake."""
    prompts = tmp_path_factory.mktemp("page") / "prompts.json"
    made = {row: MISTAKES[row].prompt for row in SEEN}
    prompts.write_text(json.dumps({row: numbered(prompt) for row, prompt in made.items()}), encoding="utf-8")
    return page("tell", prompts)["told"]


@pytest.mark.browser
@pytest.mark.parametrize("row", SEEN)
def test_read_from_the_page(told, row):
    """The sentence stands on the page, by itself or behind the kind of error; only the guilty input is marked."""
    lines = [line.removeprefix("- ").rpartition("ValueError: ")[2] for line in told[row]["text"]]
    whole = [line.partition(" · ")[0] for line in lines]
    assert any(fits(row, line) for line in whole), lines[:40]
    assert tuple(told[row]["marks"]) == MISTAKES[row].marks
    assert "custom_nodes" not in "".join(line for line in told[row]["text"] if "Exception" in line)
