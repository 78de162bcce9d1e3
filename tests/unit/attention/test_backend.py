"""Which precision `auto` stands for: on no GPU and for no model family 4 bits, which save memory and no time."""

from __future__ import annotations

import pytest
import torch
from comfyui_paro.kernels.core.dispatch import resolve_precision
from comfyui_paro.kernels.core.precision import PRECISIONS
from comfyui_paro.paro_runtime.config.recipes import all_recipes
from comfyui_paro.paro_runtime.config.settings import Settings

CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]


@pytest.fixture(params=[*CAPABILITIES, "hip", "cpu"], ids=str)
def device(request, monkeypatch) -> torch.device:
    if request.param == "cpu":
        return torch.device("cpu")
    monkeypatch.setattr(torch.version, "hip", "6.4" if request.param == "hip" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    return torch.device("cuda")


def test_auto_never_takes_4_bits(device):
    recipes = all_recipes()
    assert len(recipes) > 20
    for recipe in recipes.values():
        chosen = PRECISIONS[resolve_precision(Settings().precision, recipe.precision, device)]
        assert "int4" not in (chosen.qk, chosen.pv), recipe.family


def test_what_the_user_names_is_taken(device):
    for name in PRECISIONS:
        assert resolve_precision(name, "auto", device) == name
