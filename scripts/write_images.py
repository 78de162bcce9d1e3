"""Write docs/images/ from a real ComfyUI's page, in both of its renderers: python scripts/write_images.py

The pack's nodes, and the demo and PARO Compare after a run. Needs what scripts/write_workflows.py needs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from _host import find_host
from comfy_server import ComfyServer
from PIL import Image
from write_workflows import FOLDER, PACK, page

IMAGES = PACK / "docs" / "images"
RENDERERS = ("classic", "nodes2")
WORKFLOWS = {"demo": "PARO Demo", "compare": "PARO Compare", "check": "PARO Check"}
WIDTH = 1600
"""Pixels a picture has at most: text under the nodes can be read, and the file stays below 200 kB."""


def write(shot: Path, name: str) -> None:
    """One screenshot as JPEG."""
    with Image.open(shot) as picture:
        picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
        picture.convert("RGB").save(IMAGES / f"{name}.jpg", quality=80, optimize=True)


def main() -> int:
    host = find_host()
    if host is None:
        print("no ComfyUI found; set COMFYUI_PATH to a checkout", file=sys.stderr)
        return 2
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shot = folder / "shot.png"
        with ComfyServer(host, PACK, folder / "comfyui") as server:
            for renderer in RENDERERS:
                page("nodes", server.url, shot, RENDERER=renderer)
                write(shot, f"nodes_{renderer}")
                for title, workflow in WORKFLOWS.items():
                    page("run", server.url, FOLDER / f"{workflow}.json", folder / "saved.json", shot, RENDERER=renderer)
                    write(shot, f"{title}_{renderer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
