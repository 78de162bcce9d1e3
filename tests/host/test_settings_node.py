"""PARO Settings on the real host: what is shown and not used is told."""

import types

import pytest

pytestmark = pytest.mark.host_on_cpu


@pytest.mark.parametrize(
    "preset, density, told", [("balanced", 0.05, True), ("balanced", 0.3, False), ("custom", 0.05, False)]
)
def test_a_density_that_is_not_used_is_told(comfy, monkeypatch, preset, density, told):
    from comfyui_paro.nodes import settings as module

    said = []
    monkeypatch.setattr(module, "status_line", lambda node: said.append)
    monkeypatch.setattr(module.PAROSettings, "hidden", types.SimpleNamespace(unique_id="7"), raising=False)
    made = module.PAROSettings.execute(preset, density, -1)
    assert made.args[0].density == (density if preset == "custom" else None)
    assert bool(said) == told and all("is not used" in text for text in said)
