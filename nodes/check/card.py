"""What a check measured, as one line of JSON that a user can send back and `bench/report.py` can show."""

from __future__ import annotations

import json
from datetime import date

from .check import Check

KIND = "paro check"
VERSIONS = ("paro", "comfyui", "torch", "cuda", "rocm", "triton", "comfy_kitchen", "sageattention")


def card_line(check: Check) -> str | None:
    """The line, or None where nothing was measured on a GPU.

    Facts of the card, versions, the shape of the call, and name, share of blocks computed, milliseconds and relative
    error of each method; nothing of the user's files, names or other nodes.
    """
    gpu, size = check.machine["gpu"], check.size
    # The first of the host's rows is ComfyUI's own; another names a node of the user's.
    others = [row for row in check.rows if row.kind == "host"][1:]
    rows = [row for row in check.rows if row.ms is not None and row not in others]
    if gpu is None or size is None or not rows:
        return None
    facts = {"kind": KIND, "gpu": gpu, "date": date.today().isoformat()}
    facts |= {name: check.machine.get(name) for name in ("memory", "compute_capability", "driver")}
    facts |= {name: check.machine.get(name) for name in VERSIONS}
    call = size.as_dict()
    facts |= {name: call[name] for name in ("tokens", "heads", "head_dim", "dtype")}
    facts["rows"] = [
        {"name": row.name, "density": round(row.density, 4), "ms": float(f"{row.ms:.4g}"), "error": _short(row.error)}
        for row in rows
    ]
    return json.dumps(facts, separators=(",", ":"))


def _short(error: float | None) -> float | None:
    return None if error is None else float(f"{error:.3g}")
