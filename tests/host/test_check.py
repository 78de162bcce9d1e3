"""PARO Check in the real host: it knows every model's calls without running it, and fails at nothing."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from comfyui_paro.tests.host.cases_image import CASES as IMAGE_CASES
from comfyui_paro.tests.host.cases_video import CASES as VIDEO_CASES
from comfyui_paro.tests.host.test_server import SMALL, SPARSE, graph
from PIL import Image

CASES = {case.name: case for case in (*VIDEO_CASES, *IMAGE_CASES)}
GRID = (5, 8, 10)


@pytest.fixture
def check(comfy, monkeypatch):
    from comfyui_paro.kernels.core import support
    from comfyui_paro.nodes.check import check as module
    from comfyui_paro.nodes.check.chart import check_chart
    from comfyui_paro.nodes.check.in_host import Wanted, check
    from comfyui_paro.nodes.check.text import check_text

    # The tests' interpreter of kernels is no machine that anyone uses.
    for each in (support, module):
        monkeypatch.setattr(each, "interpreted", lambda: False)

    def run(*wanted, said=None, **more):
        """The check; its texts and JSON can be made whatever it found."""
        found = check(Wanted(*wanted, **more), (said if said is not None else []).append)
        assert check_text(found) and json.dumps(found.as_dict()) and check_chart(found).isfinite().all()
        return found

    return run


class Spy:
    """An attention override that notes the heads, channels and tokens of every self-attention."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int, int]] = set()

    def __call__(self, func, q, k, v, heads, *args, **kwargs):
        length = q.shape[2] if kwargs.get("skip_reshape") else q.shape[1]
        width = q.shape[3] if q.dim() == 4 else q.shape[2] // heads
        self.seen.add((heads, width, length))
        return func(q, k, v, heads, *args, **kwargs)


@pytest.mark.host_on_cpu
@pytest.mark.parametrize("name", CASES)
def test_size_of_every_family(comfy, tiny, name):
    """What is said without running the model is what attention sees when it runs."""
    from comfyui_paro.nodes.check.model import model_size

    case = CASES[name]
    if not tiny.known(case):
        pytest.skip(f"this ComfyUI has no {case.config}")
    model = tiny.build(case)
    before = dict(vars(model.model.diffusion_model))
    for run in tiny.runs(case):
        found = model_size(model, {"samples": tiny.latent(run.shape)}, tiny.prompt(case, 1, **run.extra()))
        assert found.layout.describe() == run.layout and not found.notes
        # A U-Net's are not counted, and VACE runs its control blocks once for each control.
        assert found.sites == (None if case.family == "sdxl" else case.sites)
    assert dict(vars(model.model.diffusion_model)) == before
    run, spy, spied = tiny.runs(case)[0], Spy(), model.clone()
    spied.model_options["transformer_options"]["optimized_attention_override"] = spy
    tiny.sample(spied, case, run, steps=1)
    found = model_size(model, {"samples": tiny.latent(run.shape)}, tiny.prompt(case, 1, **run.extra()))
    assert (found.heads, found.head_dim, found.layout.length) in spy.seen


@pytest.mark.parametrize("name", ["minimax_h3", "ltxav"])
def test_no_layer_of_the_model_runs(comfy, tiny, name):
    """Some models prepare their text with layers of their own, whose weights may not be loaded now."""
    from comfyui_paro.nodes.check.model import model_size

    case = CASES[name]
    if not tiny.known(case):
        pytest.skip(f"this ComfyUI has no {case.config}")
    model, run = tiny.build(case), tiny.runs(case)[0]

    def refuse(*args):
        raise AssertionError("a layer has run")

    for module in model.model.diffusion_model.modules():
        module.register_forward_pre_hook(refuse)
    found = model_size(model, {"samples": tiny.latent(run.shape)}, tiny.prompt(case, 1, **run.extra()))
    assert found.layout.describe() == run.layout


def test_without_anything_connected(check):
    said: list[str] = []
    found = check(said=said)
    assert found.outlook is None and not found.others and not found.notes
    assert found.machine["torch"] == torch.__version__ and found.machine["comfyui"]
    assert len(found.rows) == 8 and said[0] == "checking: this machine"


@pytest.mark.host_on_cpu
def test_on_a_cpu_nothing_is_measured_and_everything_is_said(comfy, wan, check):
    from comfyui_paro.nodes.check.in_host import NO_GPU
    from comfyui_paro.nodes.check.text import check_text

    found = check(comfy.patched(wan, preset="fast"), {"samples": comfy.latent(GRID)}, steps=8)
    assert {row.reason for row in found.rows} == {NO_GPU} and not found.notes
    assert not found.kernels.ready
    run = found.outlook
    assert (run.family, run.sites, sum(run.dense), len(run.dense)) == ("wan", 2, 2, 8)
    assert run.density == pytest.approx(0.55, abs=0.01)
    assert check_text(found).startswith("PARO cannot be used now: triton does not run on cpu; nothing to do")


def test_settings_and_schedules(comfy, wan, check):
    """Settings that are connected go before the patch node's; sigmas before steps; a part of a schedule is one."""
    latent, patched = {"samples": comfy.latent(GRID)}, comfy.patched(wan, preset="fast", dense_steps=2)
    assert sum(check(patched, latent).outlook.dense) == 2
    from comfyui_paro.paro_runtime.config.settings import Settings

    other = Settings(preset="quality", dense_steps=3, min_tokens=0)
    found = check(patched, latent, settings=other).outlook
    assert sum(found.dense) == 3 and found.density == pytest.approx(0.85, abs=0.01)
    assert len(check(patched, latent, sigmas=torch.linspace(1, 0, 6)).outlook.dense) == 5
    part = check(patched, latent, steps=10, denoise=0.5).outlook
    assert len(part.dense) == 10 and not any(part.dense) and "of about 20 steps" in part.part
    plain = check(wan, latent)
    assert any("PARO is not on this model" in note for note in plain.notes) and plain.outlook.family == "wan"


def test_without_a_latent_a_usual_size_is_measured(comfy, flux, check):
    found = check(comfy.patched(flux))
    assert found.outlook is None and any("no latent is connected" in note for note in found.notes)
    assert (found.size.heads, found.size.head_dim) == (2, 128) and math.isclose(found.size.layout.length, 4096)
    text = check(comfy.patched(flux), {"samples": comfy.latent((1, 24, 24), video=False)})
    assert any("512 tokens is assumed" in note for note in text.notes) and text.size.layout.prefix == 512


@pytest.mark.parametrize("latent", [{"samples": torch.zeros(8)}, {}, {"samples": "nothing"}])
def test_wrong_inputs_are_told_and_fail_nothing(wan, check, latent):
    found = check(wan, latent)
    assert found.outlook is None and found.notes and found.kernels is not None and len(found.rows) == 8


def test_a_model_that_paro_does_not_know(comfy, tiny, check):
    model = tiny.build(CASES["wan_t2v"])
    model.model.diffusion_model = torch.nn.Linear(4, 4)
    found = check(model, {"samples": comfy.latent(GRID)})
    assert found.outlook is None and any("Linear is not supported" in note for note in found.notes)


def test_other_nodes_on_the_model(comfy, wan, check):
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy.patcher_extension import WrappersMP

    patched = check(comfy.patched(wan))
    assert patched.others == () and [row.kind for row in patched.rows].count("host") == 1

    def cached(executor, *args):
        return executor(*args)

    other = wan.clone()
    if hasattr(other, "set_model_optimized_attention"):
        other.set_model_optimized_attention(attention_pytorch)
    else:
        other.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k)
    other.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "easycache", cached)
    other.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
    other.set_model_patch_replace(cached, "dit", "double_block", 0)
    other.set_model_unet_function_wrapper(cached)
    other.add_object_patch("diffusion_model.forward", cached)
    for model in (other, comfy.patched(other)):
        found = check(model)
        text = "\n".join(found.others)
        assert len(found.others) == 6
        assert "attention of another node; PARO goes first" in text and "skips evaluations" in text
        assert "attn1_patch in the attention blocks" in text and "replaces dit blocks" in text
        assert "wraps every evaluation" in text and "replaced diffusion_model.forward" in text
        assert [row.kind for row in found.rows].count("host") == 2


def test_attention_now_is_the_hosts_with_the_override(comfy, wan):
    from comfyui_paro.nodes.check.in_host import _present

    calls = []

    def override(func, *args, **kwargs):
        calls.append(kwargs.get("skip_output_reshape"))
        return func(*args, **kwargs)

    wan.model_options["transformer_options"]["optimized_attention_override"] = override
    q, k, v = (torch.randn(1, 2, 20, 64) for _ in range(3))
    plain, now = (method.make(q, k, v)() for method in _present(comfy.patched(wan)))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(now, expected)
    assert calls == [True]


def test_a_part_that_fails_is_a_note_and_an_interrupt_is_not(comfy, wan, check, monkeypatch):
    from comfy import model_management
    from comfyui_paro.nodes.check import in_host as module

    def fail(*args):
        raise RuntimeError("broken")

    latent = {"samples": comfy.latent(GRID)}
    names = ("machine", "model_size", "check_kernels", "others_on", "_rows")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(module, name, fail)
        found = check(wan, latent)
    assert sum("RuntimeError: broken" in note for note in found.notes) == len(names)

    def stop():
        raise model_management.InterruptProcessingException

    monkeypatch.setattr(model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(model_management.InterruptProcessingException):
        check(wan, latent)


def test_the_node_on_a_server(server):
    nodes = graph(SMALL, seed=31, settings=SPARSE)
    inputs = {"model": ["paro", 0], "latent": ["empty", 0], "positive": ["positive", 0], "steps": 6, "denoise": 1.0}
    nodes["check"] = {"class_type": "PAROCheck", "inputs": inputs}
    nodes["rows"] = {"class_type": "PreviewAny", "inputs": {"source": ["check", 1]}}
    kept = ("model", "positive", "empty", "settings", "paro", "check", "rows")
    history = server.run({name: node for name, node in nodes.items() if name in kept})
    text, found = server.text(history, "check"), json.loads(server.text(history, "rows"))
    assert "\n- Wan 2.1 and 2.2, 100 tokens" in text or "tokens: 5 x 8 x 10 of the picture" in text
    assert found["run"]["family"] == "wan" and len(found["run"]["dense"]) == 6 and len(found["rows"]) == 8
    assert found["call"]["layout"] == "0 + 5x8x10 + 0" and found["call"]["heads"] == 2
    (picture,) = server.images(history, "check")
    assert Image.open(io.BytesIO(picture)).width == 720
    alone = server.run({"check": {"class_type": "PAROCheck", "inputs": {"steps": 20, "denoise": 1.0}}})
    assert server.text(alone, "check")
