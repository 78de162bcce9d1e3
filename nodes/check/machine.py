"""What a machine is, as far as it decides which attention runs on it and how fast."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import torch

from .methods import version_of

NVIDIA_SMI = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
# Packages that bring attention, by the names they are installed under.
PACKAGES = {
    "triton": ("triton", "triton-windows"),
    "comfy_kitchen": ("comfy-kitchen",),
    "sageattention": ("sageattention",),
    "flash_attn": ("flash-attn",),
    "xformers": ("xformers",),
}


def machine(device: torch.device) -> dict[str, str | float | None]:
    """JSON-ready facts; None for what is not there. memory: of the GPU, in GiB."""
    facts: dict[str, str | float | None] = {"device": str(device), "gpu": None, "memory": None}
    facts |= {"compute_capability": None, "driver": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "memory": round(properties.total_memory / 2**30, 1)}
        if torch.version.hip is None:
            facts |= {"compute_capability": f"{properties.major}.{properties.minor}", "driver": _driver()}
    facts |= {"paro": _own_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "rocm": torch.version.hip}
    facts |= {name: version_of(*packages) for name, packages in PACKAGES.items()}
    return {**facts, "python": platform.python_version(), "system": platform.platform()}


def _driver() -> str | None:
    """Version of NVIDIA's driver, or None where its tool does not tell."""
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.split() or [None])[0] if done.returncode == 0 else None


def _own_version() -> str | None:
    try:
        found = re.search(r'^version = "([^"]+)"', PYPROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None
