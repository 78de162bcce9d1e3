"""Find a ComfyUI checkout; standard library only."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLONE = ROOT / ".cache" / "ComfyUI"
REPOSITORY = "https://github.com/Comfy-Org/ComfyUI"
TESTED_TAG = "v0.33.0"


def is_host(path: Path) -> bool:
    """Whether a folder is a ComfyUI checkout."""
    return (path / "comfyui_version.py").is_file() and (path / "comfy" / "samplers.py").is_file()


def find_host() -> Path | None:
    """COMFYUI_PATH, the folder whose custom_nodes holds this pack, ../ComfyUI, ~/ComfyUI, our own clone; else None.

    Raises SystemExit when COMFYUI_PATH is set to something that is not a checkout: a typo must not pass as "no host".
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        if not is_host(Path(named)):
            raise SystemExit(f"COMFYUI_PATH: {named} is not a ComfyUI checkout")
        return Path(named).resolve()
    places = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    places += [ROOT.parent / "ComfyUI", Path.home() / "ComfyUI", CLONE]
    return next((place.resolve() for place in places if is_host(place)), None)


def clone_host() -> Path:
    """Clone ComfyUI at the tested tag into `.cache/`. Raises SystemExit with the reason when that fails."""
    CLONE.parent.mkdir(parents=True, exist_ok=True)
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", TESTED_TAG, REPOSITORY, str(CLONE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"ComfyUI: cloning failed ({error}); set COMFYUI_PATH to a checkout") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["git failed"])[-1]
        raise SystemExit(f"ComfyUI: cloning failed ({last}); set COMFYUI_PATH to a checkout")
    return CLONE


def host_version(path: Path) -> str:
    """The version a checkout declares."""
    match = re.search(r'__version__ = "([^"]+)"', (path / "comfyui_version.py").read_text(encoding="utf-8"))
    return match.group(1) if match else "unknown"
