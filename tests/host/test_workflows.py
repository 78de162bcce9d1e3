"""The example workflows fit the nodes there are, and open and run in the real page."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
from comfyui_paro.scripts._host import TESTED_TAG, host_version
from PIL import Image

PACK = Path(__file__).resolve().parent.parent.parent
FOLDER = PACK / "example_workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
IDS = [path.stem for path in WORKFLOWS]
DENSITY, BY_RECIPE = 0.3, -1  # the widgets' defaults
DRAWN = {"MarkdownNote"}  # the page's own nodes, which the server does not know
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


def _kind(declared: list) -> str:
    """The type of an input; old-style combos declare their options in its place."""
    return "COMBO" if isinstance(declared[0], list) else declared[0]


def _drawn_as_widget(declared: list) -> bool:
    """An input of several types, such as FLOAT,INT, is one where each of them is."""
    return set(_kind(declared).split(",")) <= WIDGETS


def _options(declared: list) -> list | None:
    if isinstance(declared[0], list):
        return declared[0]
    return declared[1].get("options") if declared[0] == "COMBO" else None


@pytest.fixture(scope="module")
def known(server) -> dict:
    return server.json("/object_info")


@pytest.fixture(scope="module", autouse=True)
def host_of_the_workflows(host_path):
    """They are written for one version: another one may lack their models, or have other widgets."""
    if f"v{host_version(host_path)}" != TESTED_TAG:
        pytest.skip(
            f"WORKFLOWS NOT TESTED: they are written for ComfyUI {TESTED_TAG}, this is {host_version(host_path)}"
        )


@pytest.mark.parametrize("path", WORKFLOWS, ids=IDS)
def test_workflow_matches_the_nodes(known, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in DRAWN}
    assert any(node["type"] == "PAROPatchModel" for node in nodes.values())
    for node in nodes.values():
        info = known[node["type"]]
        declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for entry in node["inputs"]:
            if entry.get("link") is None and not node["type"].startswith("PARO"):
                continue  # the host's own widgets come and go with its versions
            assert entry["name"] in declared, (node["type"], entry["name"])
            if entry.get("link") is not None:
                _, source, slot, target, _, kind = links[entry["link"]]
                assert target == node["id"] and known[nodes[source]["type"]]["output"][slot] == kind
                assert _kind(declared[entry["name"]]) in (kind, "*")
        required = {name for name, d in info["input"].get("required", {}).items() if not _drawn_as_widget(d)}
        assert required <= {entry["name"] for entry in node["inputs"] if entry.get("link") is not None}, node["type"]
        if node["type"].startswith("PARO"):
            _check_widgets(node, declared)


def _check_widgets(node: dict, declared: dict) -> None:
    """One value per widget, in the schema's order, each allowed."""
    widgets = {name: d for name, d in declared.items() if _kind(d) in WIDGETS}
    for name in [name for name, d in widgets.items() if d[1].get("control_after_generate")]:
        # The page draws one more widget after such a number.
        place = list(widgets).index(name) + 1
        after = {f"{name} after": ("COMBO", {"options": ["fixed", "increment", "decrement", "randomize"]})}
        widgets = {**dict(list(widgets.items())[:place]), **after, **dict(list(widgets.items())[place:])}
    assert len(node.get("widgets_values", [])) == len(widgets), node["type"]
    for value, (name, d) in zip(node.get("widgets_values", []), widgets.items(), strict=True):
        options = _options(d)
        if options is not None:
            assert value in options, (node["type"], name, value)
        elif _kind(d) in ("INT", "FLOAT"):
            assert d[1]["min"] <= value <= d[1]["max"], (node["type"], name, value)


@pytest.mark.parametrize("path", WORKFLOWS, ids=IDS)
def test_workflow_says_nothing_about_the_machine_it_was_made_on(path):
    text = path.read_text(encoding="utf-8")
    assert "/home/" not in text and "/root" not in text and "/tmp" not in text and "127.0.0.1" not in text


def _notes(workflow: dict) -> str:
    return "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in DRAWN)


def _downloads(workflow: dict) -> list[dict]:
    """name, url and directory of every model that a workflow's nodes offer to download."""
    return [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]


@pytest.mark.parametrize("path", WORKFLOWS, ids=IDS)
def test_workflow_says_what_it_is_and_what_to_download(path):
    """A note with a title in words that names each model file and where it comes from; what loads files offers them."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    note, offered = _notes(workflow), {model["name"]: model for model in _downloads(workflow)}
    assert note.startswith("## ") and len(note) > 300
    for model in offered.values():
        assert model["name"] in note and model["url"].split("/resolve/")[0].split("/", 3)[3] in note
        assert model["url"].endswith("/" + model["name"])
    files = [
        value for node in workflow["nodes"] if node["type"] not in DRAWN for value in node.get("widgets_values", [])
    ]
    loaded = {value for value in files if isinstance(value, str) and value.endswith(".safetensors")}
    assert loaded == set(offered)


@pytest.mark.parametrize("path", WORKFLOWS, ids=IDS)
def test_workflow_uses_the_preset_and_the_recipe(path):
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        values = node.get("widgets_values", [])
        if node["type"] == "PAROSettings":  # preset, density, precision, dense_steps
            assert [values[0], values[1], values[3]] == ["balanced", DENSITY, BY_RECIPE]
        if node["type"] == "PAROPatchModel":  # enabled, plan_file, speed, density
            assert values[:4] == [True, "auto", "balanced", DENSITY]


@pytest.mark.parametrize("path", WORKFLOWS, ids=IDS)
def test_workflow_has_a_picture(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and 400 < picture.width <= 900
    assert path.with_suffix(".jpg").stat().st_size < 150_000


def test_template_browser_offers_every_workflow(server):
    """As the page asks for them: the list, each file and its picture."""
    (names,) = server.json("/api/workflow_templates").values()
    assert set(names) == {path.stem for path in WORKFLOWS}
    for path in (*WORKFLOWS, *(path.with_suffix(".jpg") for path in WORKFLOWS)):
        address = f"{server.url}/api/workflow_templates/paro-attention/{quote(path.name)}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert answer.read() == path.read_bytes()


@pytest.mark.browser
def test_round_trip_through_the_page(page, server, tmp_path):
    """The demo workflow opens and runs; as the page saved it, with a plan file that is not here, it runs again."""
    saved = tmp_path / "saved.json"
    first = page("run", FOLDER / "PARO Demo.json", saved)
    assert first == {"errors": [], "missing": [], "run": {"how": "success"}}
    workflow = json.loads(saved.read_text())
    (patch,) = [node for node in workflow["nodes"] if node["type"] == "PAROPatchModel"]
    patch["widgets_values"][1] = "theirs.safetensors"
    saved.write_text(json.dumps(workflow))
    plans = set((server.folder / "models" / "paro").glob("*"))
    second = page("run", saved)
    assert second["run"] == {"how": "success"} and not second["errors"]
    assert "theirs.safetensors is not in models/paro" in server.log.read_text(errors="replace")
    assert set((server.folder / "models" / "paro").glob("*")) == plans  # every run made its own


@pytest.fixture
def with_models(server, host_path):
    """Empty files in the place of what the workflows download, and the host's example picture."""
    wanted = [model for path in WORKFLOWS for model in _downloads(json.loads(path.read_text(encoding="utf-8")))]
    files = {server.folder / "models" / model["directory"] / model["name"] for model in wanted}
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    picture = server.folder / "input" / "example.png"
    shutil.copy(host_path / "input" / "example.png", picture)
    yield
    for file in (*files, picture):
        file.unlink()


@pytest.mark.browser
@pytest.mark.parametrize("renderer", ["classic", "nodes2"])
def test_page_opens_every_workflow(page, with_models, renderer):
    """The page knows every node and finds every file where the workflow says it belongs, so nothing is red, and no node
    lies over another at the size that the page draws it."""
    opened = page("open", *WORKFLOWS, RENDERER=renderer)["opened"]
    nothing = {"missing": [], "red": [], "overlaps": [], "errors": []}
    assert {Path(path).stem: found for path, found in opened.items()} == dict.fromkeys(IDS, nothing)


@pytest.mark.browser
def test_nothing_overlaps_before_the_models_are_there(page):
    """Nodes 2.0 draws an error below each node whose file is missing: how a new user sees most of the workflows."""
    opened = page("open", *WORKFLOWS, RENDERER="nodes2")["opened"]
    assert any(found["red"] for found in opened.values())
    assert not [(path, found["overlaps"]) for path, found in opened.items() if found["overlaps"]]


@pytest.mark.browser
def test_files_are_what_the_script_writes(page, tmp_path):
    """After a change of scripts/workflows/: python scripts/write_workflows.py."""
    page("build", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert (tmp_path / path.name).read_text() == path.read_text(), path.stem


@pytest.mark.browser
@pytest.mark.parametrize("name", ["PARO Compare", "PARO Check"])
def test_workflow_runs_without_a_download(page, name):
    assert page("run", FOLDER / f"{name}.json") == {"errors": [], "missing": [], "run": {"how": "success"}}
