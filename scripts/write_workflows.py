"""Write example_workflows/ and subgraphs/ from scripts/workflows.mjs in a real page: python scripts/write_workflows.py

Writes one .json per workflow and a picture of the same name for the template browser, and one .json per blueprint. What
needs no download is run first, so that its picture shows results.
Needs a ComfyUI, node, playwright-core and Chromium as scripts/page.mjs does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _host import find_host
from comfy_server import ComfyServer
from PIL import Image

PACK = Path(__file__).resolve().parent.parent
FOLDER, BLUEPRINTS = PACK / "example_workflows", PACK / "subgraphs"
PICTURE_SIZE = (900, 900)
"""Pixels a thumbnail has at most: the browser draws it some 400 wide."""


def page(*arguments: object, **variables: str) -> dict:
    """Run scripts/page.mjs, with environment variables in capitals, and return its answer.

    Raises RuntimeError where it fails or a workflow does.
    """
    command = ["node", str(PACK / "scripts" / "page.mjs"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["errors"] or answer.get("missing") or answer.get("run", {"how": "success"})["how"] != "success":
        raise RuntimeError(f"{arguments}: {answer}")
    return answer


def place_models(workflow: Path, models: Path) -> bool:
    """Put an empty file in the place of every model that a workflow has to download, so that the page draws no node
    red; whether there are any."""
    nodes = json.loads(workflow.read_text(encoding="utf-8"))["nodes"]
    wanted = [model for node in nodes for model in node["properties"].get("models", [])]
    for model in wanted:
        (models / model["directory"]).mkdir(parents=True, exist_ok=True)
        (models / model["directory"] / model["name"]).touch()
    return bool(wanted)


def write_picture(url: str, workflow: Path, folder: Path, runs: bool) -> None:
    """Write the thumbnail of one workflow file beside it, as JPEG; of one that `runs` after a run."""
    shot = folder / "shot.png"
    if runs:
        page("run", url, workflow, folder / "saved.json", shot)
    else:
        page("shot", url, workflow, shot)
    with Image.open(shot) as picture:
        picture.thumbnail(PICTURE_SIZE, Image.Resampling.LANCZOS)
        picture.convert("RGB").save(workflow.with_suffix(".jpg"), quality=82, optimize=True)


def main() -> int:
    host = find_host()
    if host is None:
        print("no ComfyUI found; set COMFYUI_PATH to a checkout", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ComfyServer(host, PACK, folder / "comfyui") as server:
            shutil.copy(host / "input" / "example.png", server.folder / "input")
            page("build", server.url, FOLDER)
            page("blueprints", server.url, BLUEPRINTS)
            for workflow in sorted(FOLDER.glob("*.json")):
                print(workflow.stem, flush=True)
                runs = not place_models(workflow, server.folder / "models")
                write_picture(server.url, workflow, folder, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
