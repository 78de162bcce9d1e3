"""Every node has names and tooltips in four languages and help pages in English and Chinese, where the page looks for
them."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent.parent
HELP = PACK / "web" / "docs"
# The page asks for docs/<node>/<language>.md first, then for docs/<node>.md, which is English.
PAGES = {"en": "{}.md", "zh": "{}/zh.md"}
NODES = sorted(path.stem for path in HELP.glob("*.md"))


@pytest.fixture(scope="module")
def ours(server) -> dict:
    """object_info of the pack's nodes, by name."""
    return {name: info for name, info in server.json("/object_info").items() if name.startswith("PARO")}


def _inputs(info: dict) -> dict:
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def test_names_and_tooltips_for_every_node(ours, server):
    """Names of all inputs and outputs in every language; tooltips everywhere."""
    assert {"PAROSettings", "PAROPatchModel", "PAROCalibrate", "PAROReport", "PAROCompare", "PAROCheck"} <= set(ours)
    translated = server.json("/i18n")
    for name, info in ours.items():
        declared = _inputs(info)
        assert all(d[1].get("tooltip") for d in declared.values()), name
        assert all(info["output_tooltips"]), name
        for language in ("en", "zh", "ja", "ko"):
            entry = translated[language]["nodeDefs"][name]
            assert set(entry["inputs"]) == set(declared), (language, name)
            assert set(entry["outputs"]) == {str(i) for i in range(len(info["output"]))}, (language, name)
            assert all(d.get("tooltip") for d in entry["inputs"].values()), (language, name)
        english = translated["en"]["nodeDefs"][name]["inputs"]
        # After a change of a schema: scripts/write_names.py, then the other languages by hand.
        assert all(english[key]["tooltip"] == d[1]["tooltip"] for key, d in declared.items()), name


def test_every_node_has_help(ours):
    assert sorted(ours) == NODES
    assert sorted(path.parent.name for path in HELP.glob("*/zh.md")) == NODES


@pytest.mark.parametrize("language", PAGES)
@pytest.mark.parametrize("name", NODES)
def test_help_names_every_input_and_output(ours, server, name, language):
    """It is served, begins with the node's name, and names each input and output as the node does."""
    path = PAGES[language].format(name)
    with urllib.request.urlopen(f"{server.url}/extensions/paro-attention/docs/{path}", timeout=60) as answer:
        text = answer.read().decode()
    assert text == (HELP / path).read_text(encoding="utf-8")
    translated = server.json("/i18n")[language]["nodeDefs"][name]
    assert text.startswith(f"# {translated['display_name']}\n")
    missing = [word for word in (*_inputs(ours[name]), *ours[name]["output_name"]) if f"`{word}`" not in text]
    assert not missing


@pytest.mark.parametrize("language", PAGES)
@pytest.mark.parametrize("name", NODES)
def test_help_fits_the_panel(name, language):
    """Tables of more than two columns scroll sideways in the page's panel."""
    lines = (HELP / PAGES[language].format(name)).read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows and {row.count("|") for row in rows} == {3}
