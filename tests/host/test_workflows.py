"""The example workflows fit the nodes there are, and open and run in the real page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent.parent
FOLDER = PACK / "example_workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
DRAWN = {"MarkdownNote"}  # the page's own nodes, which the server does not know
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


def _kind(declared: list) -> str:
    """The type of an input; old-style combos declare their options in its place."""
    return "COMBO" if isinstance(declared[0], list) else declared[0]


def _options(declared: list) -> list | None:
    if isinstance(declared[0], list):
        return declared[0]
    return declared[1].get("options") if declared[0] == "COMBO" else None


@pytest.fixture(scope="module")
def known(server) -> dict:
    return server.json("/object_info")


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
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
        required = {name for name, d in info["input"].get("required", {}).items() if _kind(d) not in WIDGETS}
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


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_workflow_says_nothing_about_the_machine_it_was_made_on(path):
    text = path.read_text(encoding="utf-8")
    assert "/home/" not in text and "/root" not in text and "/tmp" not in text and "127.0.0.1" not in text


def test_help_and_names_for_every_node(known, server):
    """Each node has a help page and English and Chinese names for all its inputs and outputs; tooltips everywhere."""
    ours = {name: info for name, info in known.items() if name.startswith("PARO")}
    assert {"PAROSettings", "PAROPatchModel", "PAROCalibrate", "PAROReport", "PAROCompare", "PAROCheck"} <= set(ours)
    translated = server.json("/i18n")
    for name, info in ours.items():
        assert (PACK / "web" / "docs" / f"{name}.md").is_file(), name
        declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert all(d[1].get("tooltip") for d in declared.values()), name
        assert all(info["output_tooltips"]), name
        for language in ("en", "zh"):
            entry = translated[language]["nodeDefs"][name]
            assert set(entry["inputs"]) == set(declared), (language, name)
            assert set(entry["outputs"]) == {str(i) for i in range(len(info["output"]))}, (language, name)
            assert all(d.get("tooltip") for d in entry["inputs"].values()), (language, name)
        english = translated["en"]["nodeDefs"][name]["inputs"]
        # After a change of a schema: scripts/write_names.py, then the other languages by hand.
        assert all(english[key]["tooltip"] == d[1]["tooltip"] for key, d in declared.items()), name


@pytest.mark.browser
def test_round_trip_through_the_page(page, server, tmp_path):
    """The demo workflow opens and runs; as the page saved it, with a plan file that is not here, it runs again."""
    saved = tmp_path / "saved.json"
    first = page("run", FOLDER / "paro_demo_tiny_model.json", saved)
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


@pytest.mark.browser
@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_page_knows_every_node(page, path, tmp_path):
    assert page("shot", path, tmp_path / "shot.png") == {"errors": [], "missing": []}
