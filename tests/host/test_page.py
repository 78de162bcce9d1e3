"""The page beside the workflows: what the search finds, what stands behind a node's (i), and the blueprints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
PACK = Path(__file__).resolve().parent.parent.parent
BLUEPRINTS = sorted((PACK / "subgraphs").glob("*.json"))
MAIN = "PARO Patch Model"
FIRST = ("sparse attention", "faster", "accelerate", "稀疏注意力", "稀疏", "注意力", "加速")
FOUND = ("speed", "paro")
RENDERERS = pytest.mark.parametrize("renderer", ["classic", "nodes2"])


def test_the_search_finds_the_main_node(page):
    """The page ranks words of a title before a node's other words, and popular nodes before others."""
    found = page("find", *FIRST, *FOUND)["found"]
    assert {word: found[word][0] for word in FIRST} == dict.fromkeys(FIRST, MAIN)
    assert all(MAIN in found[word] for word in FOUND)


@RENDERERS
def test_help_opens_from_the_node(page, renderer):
    """In the page's panel stands the node's help, not only its description."""
    pages = sorted((PACK / "web" / "docs").glob("*.md"))
    answer = page("help", *(path.stem for path in pages), RENDERER=renderer)
    assert not answer["errors"]
    for path in pages:
        rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
        told = {row.split("|")[1].strip().replace("`", "") for row in rows}
        assert told and told <= {line.split("\t")[0] for line in answer["found"][path.stem]}, path.stem


def test_the_host_lists_the_blueprints(server):
    listed = server.json("/global_subgraphs")
    ours = {
        entry["name"]: key for key, entry in listed.items() if entry["info"]["node_pack"].endswith("paro-attention")
    }
    assert sorted(ours) == [path.stem for path in BLUEPRINTS]
    for path in BLUEPRINTS:
        assert server.json(f"/global_subgraphs/{ours[path.stem]}")["data"] == path.read_text(encoding="utf-8")


@RENDERERS
def test_the_page_adds_each_blueprint(page, renderer):
    """From the search, as a node: nothing stands on the outside twice, and the model goes in and comes out."""
    answer = page("add", *(path.stem for path in BLUEPRINTS), RENDERER=renderer)
    assert not answer["errors"]
    for name, nodes in answer["added"].items():
        (node,) = nodes
        assert node["title"] == name and "PAROPatchModel" in node["within"]
        assert "model" in node["inputs"] and len(set(node["inputs"])) == len(node["inputs"]), node["inputs"]
        assert set(node["widgets"]) < set(node["inputs"]) and node["outputs"]


def test_blueprints_are_what_the_script_writes(page, tmp_path):
    """After a change of scripts/workflows/ or of a node: python scripts/write_workflows.py."""
    page("blueprints", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in BLUEPRINTS]
    for path in BLUEPRINTS:
        assert (tmp_path / path.name).read_text() == path.read_text(), path.stem


SOURCES = {
    "model": ("UNETLoader", ["tiny.safetensors", "default"], "MODEL"),
    "positive": ("PARODemoConditioning", ["circle", "right-down", "flat"], "CONDITIONING"),
    "negative": ("PARODemoConditioning", ["circle", "right-down", "flat"], "CONDITIONING"),
    "latent_image": ("EmptyHunyuanLatentVideo", [128, 128, 17, 1], "LATENT"),
    "vae": ("PARODemoVAE", [], "VAE"),
}


def test_a_blueprint_runs(page, tmp_path):
    """PARO side by side with the tiny model: a node before every socket."""
    workflow = json.loads((PACK / "subgraphs" / "PARO side by side.json").read_text(encoding="utf-8"))
    (node,) = workflow["nodes"]
    common = {"pos": [0, 0], "size": [300, 100], "flags": {}, "order": 0, "mode": 0, "properties": {}, "inputs": []}
    for slot, entry in enumerate(node["inputs"]):
        if "widget" in entry:
            continue
        kind, values, made = SOURCES[entry["name"]]
        number = entry["link"] = 100 + slot
        outputs = [{"name": made, "type": made, "links": [number]}]
        workflow["nodes"].append({**common, "id": number, "type": kind, "outputs": outputs, "widgets_values": values})
        workflow["links"].append([number, number, 0, node["id"], slot, made])
    node["widgets_values"] = [2 if value == 20 else value for value in node["widgets_values"]]  # steps
    file = tmp_path / "in_use.json"
    file.write_text(json.dumps(workflow))
    assert page("run", file) == {"errors": [], "missing": [], "run": {"how": "success"}}
