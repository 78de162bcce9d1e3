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


@pytest.mark.parametrize(
    "wired, given, expected, told",
    [
        (False, {}, ("balanced", None, "auto"), None),
        (False, {"speed": "fast", "precision": "16bit"}, ("fast", None, "16bit"), None),
        (False, {"speed": "custom", "density": 0.2}, ("custom", 0.2, "auto"), None),
        (
            False,
            {"density": 0.2},
            ("balanced", None, "auto"),
            "density 0.2 is not used, since speed is balanced",
        ),
        (True, {}, ("quality", None, "auto"), None),
        (
            True,
            {"speed": "fast", "precision": "int8"},
            ("quality", None, "auto"),
            "speed, precision not used, since PARO Set",
        ),
    ],
)
def test_the_main_node_chooses_speed_by_itself(comfy, wan, store, monkeypatch, wired, given, expected, told):
    """And says which of its widgets do not count."""
    from comfyui_paro.nodes import patch_model as module
    from comfyui_paro.paro_runtime.config.settings import Settings

    said, used = [], []
    monkeypatch.setattr(module, "status_line", lambda node: said.append)
    monkeypatch.setattr(module, "plan_store", lambda: store)
    monkeypatch.setattr(module, "patch_model", lambda model, settings, **more: used.append((settings, more["note"])))
    monkeypatch.setattr(module.PAROPatchModel, "hidden", types.SimpleNamespace(unique_id="7"), raising=False)
    settings = {"settings": Settings(preset="quality")} if wired else {}
    module.PAROPatchModel.execute(wan, **settings, **given)
    ((found, note),) = used
    assert (found.preset, found.density, found.precision) == expected
    assert note is None and not said if told is None else note.startswith(told) and said == [note]


def test_a_refusal_is_on_the_node_until_the_input_is_right(comfy, monkeypatch):
    from comfyui_paro.nodes import errors
    from comfyui_paro.nodes.settings import PAROSettings

    said = []
    monkeypatch.setattr(errors, "status_line", lambda node: lambda text: said.append((node, text)))
    monkeypatch.setattr(PAROSettings, "hidden", types.SimpleNamespace(unique_id="7"), raising=False)
    sentence = "dense_blocks: the range '3-1' does not rise; write 1-3"
    assert PAROSettings.validate_inputs(dense_blocks="0, 1") is True and not said
    assert PAROSettings.validate_inputs(dense_blocks="3-1") == sentence
    assert PAROSettings.validate_inputs(dense_blocks="1-3") is True
    assert PAROSettings.validate_inputs(dense_blocks="1-3") is True
    assert said == [("7", sentence), ("7", " ")]


def test_a_mistake_ends_a_run_as_a_built_in_error_and_is_on_the_node(comfy):
    from comfyui_paro.nodes.errors import MISTAKES, told

    for kind in MISTAKES:
        said = []
        with pytest.raises(ValueError, match="wrong; mend it") as error, told(said.append):
            raise kind("wrong; mend it")
        assert type(error.value) is ValueError and said == ["wrong; mend it"]
    # What is no mistake of the user's stays what it is.
    with pytest.raises(KeyError), told(said.append):
        raise KeyError("x")
    assert len(said) == 1
