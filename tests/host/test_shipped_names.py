"""Nodes, inputs, outputs and choices that shipped keep working: workflows saved with them open and run."""

import asyncio
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.host
SHIPPED = Path(__file__).with_name("shipped_names.json")
HOSTS_OWN = {"sampler_name", "scheduler"}  # their choices are ComfyUI's


def names(schema) -> dict:
    """Inputs with their own choices, where they have any, and the outputs' types in order, of one node."""
    choices = {each.id: list(getattr(each, "options", None) or []) for each in schema.inputs}
    inputs = {name: [] if name in HOSTS_OWN else found for name, found in choices.items()}
    return {"inputs": inputs, "outputs": [each.io_type for each in schema.outputs]}


def test_what_shipped_is_still_there(comfy, store):
    """The file of shipped names grows with each release and never loses one. New outputs come behind the old ones."""
    pytest.importorskip("av", reason="NO av: the host's own nodes cannot be imported")
    from comfyui_paro.nodes.extension import PAROExtension

    nodes = asyncio.run(PAROExtension().get_node_list())
    now = {schema.node_id: names(schema) for schema in (node.define_schema() for node in nodes)}
    for node, shipped in json.loads(SHIPPED.read_text(encoding="utf-8")).items():
        assert node in now, node
        for name, choices in shipped["inputs"].items():
            assert name in now[node]["inputs"], f"{node}.{name}"
            assert set(choices) <= set(now[node]["inputs"][name]), f"{node}.{name}"
        assert now[node]["outputs"][: len(shipped["outputs"])] == shipped["outputs"], node
