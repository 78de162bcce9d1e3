"""What a saved picture or video tells of the PARO runs behind it, and how such a run differs from one made here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .. import VERSION
from .sentences import Sentence, joined, listed, say

if TYPE_CHECKING:
    from ..plan.plan import ModelIdentity, Plan
    from .report import Report

SHOWN = ("precision", "gpu", "version", "torch", "comfyui", "model", "plan")
"""Fields of which the result depends, in the order in which they are told."""
NAMES = {"version": "PARO", "torch": "torch", "comfyui": "ComfyUI"}
ALWAYS = ("precision", "gpu", "version")
LONGEST = 48
"""Characters of one value that are shown: the values come from a file, which anyone may have written."""


def record_of(report: Report, identity: ModelIdentity, comfyui: str | None = None) -> dict[str, Any]:
    """One run, JSON-ready: the verdict, then what made the result (versions, GPU, weights, plan, precision), then the
    figures. density: share of the blocks kept in the sparse steps that happened; attention_error: relative L2 of all
    that was measured; both None where nothing was sparse."""
    facts = report.facts
    return {
        "verdict": report.verdict(),
        "version": VERSION,
        "comfyui": comfyui,
        "torch": torch.__version__,
        "gpu": device_name(report.device),
        "model": f"{identity.family} {identity.architecture} {identity.weights}",
        "plan": plan_id(report.plan) if report.plan is not None else None,
        "plan_source": report.plan_source,
        "precision": report.precision,
        "backend": report.backend,
        "density": facts.density if facts.sparse_steps else None,
        "attention_error": report.attention_error[0] if report.attention_error else None,
        "steps": facts.steps,
        "sparse_steps": facts.sparse_steps,
        "grid": list(report.grid),
    }


def plan_id(plan: Plan) -> str:
    """16 hex digits of the model, the grid, the settings and every head's order, density and kept attention; equal for
    equal plans, with or without their masks."""
    digest = hashlib.sha256(repr((plan.identity, plan.layout, plan.block_q, sorted(plan.settings.items()))).encode())
    for site, entry in sorted(plan.sites.items()):
        digest.update(repr((site.name, entry.orders, entry.density.tolist(), entry.mass_kept.tolist())).encode())
    return digest.hexdigest()[:16]


def device_name(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` for `cuda:0`; of others the kind of device."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device.upper()


def compared(made: dict[str, Any], here: dict[str, Any]) -> Sentence:
    """One line: what a run with the same inputs was made with, and what of that is not so here."""
    differing = [name for name in SHOWN if made.get(name) != here.get(name)]
    if not differing:
        return say("made with {made}: all the same here, with the same weights and plan", made=_listed(made, ALWAYS))
    # Another GPU or precision makes another plan: that is no news.
    if len(differing) > 1 and "plan" in differing:
        differing.remove("plan")
    then = [*ALWAYS, *(name for name in differing if name in NAMES and name not in ALWAYS)]
    return say(
        "made with {made}: here {here}, pixels may differ", made=_listed(made, then), here=_listed(here, differing)
    )


def _listed(record: dict[str, Any], names: Iterable[str]) -> str:
    """`FP8 on NVIDIA H100, PARO 0.1.0`."""
    parts: list[str] = []
    for name in names:
        value = _short(record.get(name), name == "precision")
        if name == "model":
            parts.append(say("other weights"))
        elif name == "plan":
            parts.append(say("another plan"))
        elif name == "gpu":  # behind the precision, if that is told
            parts = [
                say("{precision} on {gpu}", precision=parts[0], gpu=value) if parts else say("on {gpu}", gpu=value)
            ]
        else:
            parts.append(joined(" ", (NAMES[name], value)) if name in NAMES else value)
    return listed(parts)


def _short(value: Any, upper: bool) -> str:
    text = "".join(letter for letter in str(value) if letter.isprintable())[:LONGEST] if value else "unknown"
    return text.upper() if upper and value else text
