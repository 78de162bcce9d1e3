"""Run a script in a Python that has what it needs: this one, or a venv made in the checkout. Standard library only."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "tests" / "requirements.txt"
BASE_MODULES = ("torch", "numpy", "safetensors", "PIL")
TEST_MODULES = (*BASE_MODULES, "pytest", "xdist", "ruff", "importlinter", "mypy", "jsonschema", "kornia", "hypothesis")
HOST_MODULES = (*BASE_MODULES, "torchvision", "torchaudio", "transformers", "comfy_kitchen", "aiohttp", "einops")
# The host's torch companions for the torch that tests/requirements.txt pins, installed without their dependencies.
TORCH_COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")
# Large or optional parts of the host that neither the tests nor the demo touch.
NOT_NEEDED = {
    "torch",
    "torchvision",
    "torchaudio",
    "comfyui-workflow-templates",
    "comfyui-embedded-docs",
    "kornia",
    "spandrel",
    "pyopengl",
    "comfy-angle",
}


def venv_python() -> Path:
    """The venv's interpreter on this platform."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def has(modules: tuple[str, ...]) -> bool:
    """Whether the running Python can import all of these."""
    return all(importlib.util.find_spec(name) is not None for name in modules)


def host_requirements(host: Path) -> list[str]:
    """The host's own requirements without torch and what we never use."""
    lines = (line.split("#")[0].strip() for line in (host / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and re.split(r"[<>=~!\s\[;]", line)[0].lower() not in NOT_NEEDED]


def _pip(*arguments: str) -> None:
    command = [str(venv_python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command)
    if done.returncode:
        raise SystemExit(f"set-up: pip could not install {' '.join(arguments)}")


def _installed(stamp: Path, key: str) -> bool:
    return stamp.is_file() and stamp.read_text() == key


def ensure(modules: tuple[str, ...], host: Path | None = None) -> None:
    """Return when this Python has `modules` (and the host needs); otherwise set up `.venv`, run there, exit."""
    needed = modules if host is None else (*modules, *HOST_MODULES)
    if has(needed):
        return
    if Path(sys.executable).absolute() == venv_python().absolute() and os.environ.get("PARO_VENV_READY"):
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        raise SystemExit(f"set-up: {VENV} still lacks {', '.join(missing)}; delete the folder and try again")
    if not venv_python().is_file():
        print(f"setting up {VENV} (once)", flush=True)
        venv.EnvBuilder(with_pip=True).create(VENV)
    key = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    stamp = VENV / "paro-base"
    if not _installed(stamp, key):
        print("installing torch and the test tools (minutes, once)", flush=True)
        _pip("-r", str(REQUIREMENTS))
        stamp.write_text(key)
    if host is not None:
        wanted = host_requirements(host)
        key = hashlib.sha256("\n".join((*wanted, *TORCH_COMPANIONS)).encode()).hexdigest()
        stamp = VENV / "paro-host"
        if not _installed(stamp, key):
            print("installing what ComfyUI needs (minutes, once)", flush=True)
            # The pinned torch stands in the same command, so that no dependency can replace it.
            _pip(*wanted, "-r", str(REQUIREMENTS))
            _pip("--no-deps", *TORCH_COMPANIONS)
            _make_torchaudio_importable()
            stamp.write_text(key)
    environment = {**os.environ, "PARO_VENV_READY": "1"}
    raise SystemExit(subprocess.run([str(venv_python()), *sys.argv], env=environment).returncode)


def _make_torchaudio_importable() -> None:
    """A CUDA build of torchaudio cannot load its libraries beside a CPU torch; without them the rest imports."""
    if subprocess.run([str(venv_python()), "-c", "import torchaudio"], capture_output=True).returncode == 0:
        return
    for library in VENV.glob("**/torchaudio/lib/*.so"):
        library.unlink()
