"""Which model is this, and which result? Signatures that stay equal however a model is stored, patched or loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import torch

from ..plan.plan import ModelIdentity

_PREFIX = "diffusion_model."
SAMPLED_TENSORS = 16
SAMPLED_VALUES = 64


def identify(patcher: Any, family: str) -> ModelIdentity:
    """The identity of the model in a host's model patcher. Costs about a millisecond and copies a few KB from the GPU.

    Both signatures look at the base weights: LoRAs and other patches ride on their base model's plans.
    """
    weights = _matrices(patcher)
    return ModelIdentity(family, _architecture(weights), _values(weights))


def _matrices(patcher: Any) -> dict[str, torch.Tensor]:
    """Name -> weight of every matrix, sorted by name.

    Scales and biases are left out, since quantised files add and drop some; of weights that the host has patched in
    place the backup is taken.
    """
    backup = getattr(patcher, "backup", {})
    weights = {}
    for name, value in sorted(patcher.model.diffusion_model.named_parameters()):
        if name.endswith("weight") and value.dim() >= 2:
            # Compiled models and object patches nest the module, the host's keys do not.
            name = name.replace("_orig_mod.", "")
            saved = backup.get(_PREFIX + name)
            weights[name] = value if saved is None else getattr(saved, "weight", saved)
    return weights


def _architecture(weights: dict[str, torch.Tensor]) -> str:
    lines = "\n".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in weights.items())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _values(weights: dict[str, torch.Tensor]) -> str:
    """Hash of values spread over the model. Storage that cannot be read (packed, not loaded yet) counts by name."""
    digest = hashlib.sha256()
    names = list(weights)
    for name in names[:: max(1, len(names) // SAMPLED_TENSORS)]:
        digest.update(name.encode())
        try:
            flat = weights[name].detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLED_VALUES)][:SAMPLED_VALUES]
            digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
        except Exception:  # third parties bring storage of their own, each with errors of its own
            continue
    return digest.hexdigest()[:16]


MARKED_VALUES = 64
"""Of a result, evenly spread: they tell it from others."""


def mark_of(samples: Any) -> Hashable | None:
    """What a result is known again by: its shape and some of its values. None for what is no plain tensor, or cannot be
    read: a result that is not known again is no reason to lose it."""
    if type(samples) is not torch.Tensor or not samples.numel():
        return None
    try:
        places = torch.linspace(0, samples.numel() - 1, min(samples.numel(), MARKED_VALUES)).long()
        return tuple(samples.shape), tuple(samples.flatten()[places.to(samples.device)].tolist())
    except RuntimeError:  # no memory, no values
        return None
