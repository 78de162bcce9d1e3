"""Workflows that were saved give PARO Patch Model and PARO Settings the same values when they are opened and run.

By place, by name, by a link, and as the API has them."""

from __future__ import annotations

import json

import pytest
from comfyui_paro.tests.host.test_server import SMALL, graph

SETTINGS = {
    **{"preset": "custom", "density": 0.2, "precision": "int8", "dense_steps": 1, "dense_blocks": "0, 1"},
    **{"tail": "on", "order": "paper", "budget": "per_head", "dense_attention": "host", "backend": "reference"},
    **{"min_tokens": 64, "calibrate": False, "strict": True, "verbose": True, "recipe": "wan", "mass_target": 0.9},
}
NAMES = {"PAROPatchModel": ["enabled", "plan_file", "speed", "density", "precision"], "PAROSettings": list(SETTINGS)}
DEFAULTS = ["balanced", 0.3, "auto"]
# Widgets as files have them: the first workflows of the pack had fewer.
SAVED = {
    "custom": ("PAROPatchModel", [False, "remembered", "custom", 0.2, "int8"]),
    "density that does not count": ("PAROPatchModel", [True, "auto", "fast", 0.2, "auto"]),
    "before speed": ("PAROPatchModel", [True, "auto"]),
    "all settings": ("PAROSettings", list(SETTINGS.values())),
    "before most settings": ("PAROSettings", list(SETTINGS.values())[:4]),
}


def saved(kind: str, values: list, named: bool = False, linked: bool = False) -> dict:
    """A workflow as the page writes it: the node, and where `linked` a number that is wired into its density."""
    slots = [{"name": "density", "type": "FLOAT", "widget": {"name": "density"}, "link": 1}] if linked else []
    node = {"id": 1, "type": kind, "pos": [500, 100], "size": [330, 300], "flags": {}, "order": 1, "mode": 0}
    node |= {"inputs": slots, "outputs": [], "properties": {}, "widgets_values": values}
    if named:
        node["widgets_values_named"] = dict(zip(NAMES[kind], values, strict=False))
    number = {"id": 2, "type": "PrimitiveFloat", "pos": [0, 100], "size": [270, 60], "flags": {}, "order": 0, "mode": 0}
    number |= {"inputs": [], "outputs": [{"name": "FLOAT", "type": "FLOAT", "links": [1]}], "properties": {}}
    number["widgets_values"] = [0.25]
    nodes, links = ([node, number], [[1, 2, 0, 1, 0, "FLOAT"]]) if linked else ([node], [])
    return {"last_node_id": 2, "last_link_id": 1, "nodes": nodes, "links": links, "groups": [], "version": 0.4}


def opened(page, folder, workflows: dict, **settings: bool) -> dict:
    """What the page would send of the node, by the name of its workflow."""
    for name, workflow in workflows.items():
        (folder / f"{name}.json").write_text(json.dumps(workflow))
    paths = {name: str(folder / f"{name}.json") for name in workflows}
    prompts = page("prompts", *paths.values(), SETTINGS=json.dumps(settings))["prompts"]
    return {name: prompts[path]["1"]["inputs"] for name, path in paths.items()}


def meant(kind: str, values: list) -> dict:
    return dict(zip(NAMES[kind], values, strict=False))


@pytest.mark.browser
@pytest.mark.parametrize("by_name", [False, True])
def test_the_page_opens_what_was_saved(page, tmp_path, by_name):
    """By place, as files have always had it, and by name, which newer pages write too and may be told to read."""
    workflows = {name: saved(kind, values, named=True) for name, (kind, values) in SAVED.items()}
    sent = opened(page, tmp_path, workflows, **{"Comfy.Workflow.NamedValuesRestore": by_name})
    for name, (kind, values) in SAVED.items():
        assert sent[name].items() >= meant(kind, values).items(), name
    assert list(sent["before speed"].values())[2:5] == DEFAULTS


@pytest.mark.browser
@pytest.mark.parametrize("kind", NAMES)
def test_the_page_keeps_a_number_that_is_wired_in(page, tmp_path, kind):
    values = SAVED["custom" if kind == "PAROPatchModel" else "all settings"][1]
    (sent,) = opened(page, tmp_path, {"linked": saved(kind, values, linked=True)}).values()
    assert sent == meant(kind, values) | {"density": ["2", 0]}


@pytest.mark.parametrize("density", [0.4, ["number", 0]])
def test_the_api_takes_what_was_saved(server, density):
    """Flat names, with the speed custom: the density counts, also as the result of another node."""
    nodes = graph(SMALL, seed=31, settings={})
    del nodes["settings"], nodes["paro"]["inputs"]["settings"]
    nodes["number"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 0.4}}
    nodes["paro"]["inputs"] |= {"speed": "custom", "density": density, "precision": "int8"}
    report = json.loads(server.text(server.run(nodes), "json"))
    assert report["precision"] == "int8" and abs(report["density"] - 0.4) < 0.05 and not report["notes"]
