"""Write locales/en/nodeDefs.json from the nodes' schemas: python scripts/write_names.py (needs a ComfyUI)."""

import asyncio
import json
from pathlib import Path

import _checkout
from _host import find_host
from comfy_boot import boot


def names(schema) -> dict:
    """One node's entry, as the page's translations want it: outputs by number."""
    outputs = enumerate(schema.outputs)
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
        "outputs": {str(n): {"name": o.display_name or o.id, "tooltip": o.tooltip} for n, o in outputs},
    }


def main() -> None:
    root: Path = _checkout.register()
    host = find_host()
    if host is None:
        raise SystemExit("write_names: no ComfyUI found; set COMFYUI_PATH")
    boot(host)
    from comfyui_paro.nodes.extension import PAROExtension

    nodes = asyncio.run(PAROExtension().get_node_list())
    entries = {node.define_schema().node_id: names(node.define_schema()) for node in nodes}
    path = root / "locales" / "en" / "nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
