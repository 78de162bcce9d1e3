"""The life of a run on a GPU in 16 bits: plans made, found and moved, masks of the run, several grids.

The model is the trained one that comes with the pack, through the host's loader: its heads are worth correcting. On
the CPU, in one dtype and with the PyTorch reference, everything here runs too, so that it stays true.
"""

from __future__ import annotations

import pytest
import torch
from comfyui_paro.kernels.attention import cudnn
from comfyui_paro.kernels.core.dispatch import resolve
from comfyui_paro.kernels.core.precision import PRECISIONS
from comfyui_paro.paro_runtime.attention import dense
from comfyui_paro.tests.host.cases import BACKEND, DEVICE, relative_error
from comfyui_paro.tests.tiny_wan import data

# The reference takes its time.
GRID, OTHER = ((8, 12, 12), (9, 13, 11)) if DEVICE == "cuda" else ((4, 8, 10), (5, 8, 9))
LONG = (9, *OTHER[1:])
LAYERS = 4
STEPS = 6
COMMON = {"preset": "custom", "backend": BACKEND, "min_tokens": 0}
EXACT = {"density": 1.0, "precision": "16bit", "tail": "off", "dense_steps": 0, "dense_attention": "host", **COMMON}
SPARSE = {"density": 0.4, **COMMON}
IN_PASSING = "calibrated on the way"
# Largest relative error against the dense run: clips this small lose something of what they show, noise is beyond 1.
NEAR = 0.6
# The same against a run of the same plan in 16 bits.
PRECISION_BOUNDS = {"int8": 0.3, "int8_pv8": 0.3, "fp8": 0.4, "int4": 0.6, "int4_pv4": 0.7}


@pytest.fixture(params=["bf16", pytest.param("fp16", marks=pytest.mark.host_on_gpu)])
def dtype(request) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[request.param]


@pytest.fixture
def model(comfy, dtype):
    """The trained model as the host's loader gives it."""
    return comfy.load(data.__file__.replace("data.py", "paro-tiny-wan.safetensors"), dtype)


@pytest.fixture
def sample(comfy):
    """The host's sampler with two clips of one prompt, guided."""
    prompts = [[data.context_for("cross", "left-up", "checker"), {}]], [[data.null_context(), {}]]

    def run(model, grid=GRID, **changes):
        return comfy.sample(model, grid, **{"steps": STEPS, "batch": 2, "prompts": prompts, **changes})

    return run


def rounding(dtype: torch.dtype, cfg: float = 3.0) -> float:
    """What two ways to round the attention may differ by in the result: guidance adds cfg and cfg - 1 times the errors
    of its two evaluations."""
    return 4 * torch.finfo(dtype).eps * (2 * cfg - 1)


def check(report, dense_steps: int, source: str) -> None:
    """Every site sparse in every step after the dense ones, and nothing else was asked for."""
    assert report.sites == report.sites_sparse == LAYERS, report.text()
    dense = {"dense step": dense_steps * LAYERS} if dense_steps else {}
    assert report.calls == {"sparse": (STEPS - dense_steps) * LAYERS, **dense}
    assert not report.passed and not report.fallbacks, report.text()
    assert report.plan_source == source
    assert report.backend == BACKEND and report.device.startswith(DEVICE)


@pytest.mark.parametrize("grid", [(5, 7, 9), (1, 17, 13)])
@pytest.mark.parametrize("batch, cfg", [(1, 1.0), (2, 3.0)])
def test_density_1_is_the_hosts_attention(comfy, model, dtype, sample, grid, batch, cfg):
    size = {"grid": grid, "batch": batch, "cfg": cfg}
    patched = comfy.patched(model, **EXACT)
    error = relative_error(sample(patched, **size), sample(model, **size))
    assert error < rounding(dtype, cfg)
    check(comfy.report(patched), 0, IN_PASSING)


@pytest.mark.parametrize("dense_steps, criterion, looks", [(1, "mass", LAYERS), (2, "mass", LAYERS), (4, "error", 0)])
def test_a_plan_is_made_and_then_found(comfy, model, sample, store, dense_steps, criterion, looks):
    """The second of six steps begins at 0.98 of the highest noise, where runs measure their masks themselves, the
    fourth at 0.89, where errors of blocks tell them."""
    dense = sample(model)
    for source in (IN_PASSING, "plan found"):
        patched = comfy.patched(model, store=store, dense_steps=dense_steps, **SPARSE)
        out, report = sample(patched), comfy.report(patched)
        check(report, dense_steps, source)
        assert report.plan.made["criterion"] == criterion and report.sites_routed == looks
        assert 0 < report.attention_error[0] <= report.attention_error[1] < 1
        assert report.notes == []
        error = relative_error(out, dense)
        assert error < NEAR
    assert torch.equal(sample(model), dense)


def test_a_given_plan_is_moved_to_another_grid(comfy, model, sample, store):
    sample(comfy.patched(model, store=store, dense_steps=2, **SPARSE))
    moved = comfy.patched(model, plan=store.load(store.names()[0]), dense_steps=2, **SPARSE)
    error = relative_error(sample(moved, OTHER), sample(model, OTHER))
    check(comfy.report(moved), 2, "given plan, moved to this grid")
    assert f"moved from the grid {'x'.join(map(str, GRID))}" in comfy.report(moved).notes[0]
    assert error < NEAR


def test_grids_after_one_another(comfy, model, sample, store):
    """One patched model: each grid gets a plan of its own, which is found when the grid comes back."""
    patched = comfy.patched(model, store=store, dense_steps=2, **SPARSE)
    before = {grid: sample(model, grid) for grid in (GRID, OTHER)}
    for grid, source in ((GRID, IN_PASSING), (OTHER, IN_PASSING), (GRID, "plan found"), (OTHER, "plan found")):
        error = relative_error(sample(patched, grid), before[grid])
        assert error < NEAR
        assert comfy.report(patched).grid == grid
        check(comfy.report(patched), 2, source)
    assert len(store.names()) == 2
    assert all(torch.equal(sample(model, grid), dense) for grid, dense in before.items())


def test_grids_within_one_run(comfy, model, dtype, sample, store):
    """A long video in windows: later windows are preceded by an anchor frame, and are a grid of their own."""
    windows = pytest.importorskip("comfy.context_windows")
    windowed = model.clone()
    windowed.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule("standard_static"),
        fuse_method=windows.get_matching_fuse_method("pyramid"),
        context_length=5,
        context_overlap=2,
        context_stride=1,
        closed_loop=False,
        dim=2,
    )
    size = {"grid": LONG, "batch": 1}  # the host cannot do windows of two clips
    dense = sample(windowed, **size)
    exact = comfy.patched(windowed, **EXACT)
    error = relative_error(sample(exact, **size), dense)
    assert error < rounding(dtype)
    sparse = comfy.patched(windowed, store=store, dense_steps=1, **SPARSE)
    error = relative_error(sample(sparse, **size), dense)
    assert error < NEAR
    for report in (comfy.report(exact), comfy.report(sparse)):
        assert report.sites_sparse == LAYERS and not report.passed and not report.fallbacks, report.text()
    assert sorted(store.load(name).layout.grid for name in store.names()) == [(5, *LONG[1:]), (6, *LONG[1:])]
    assert torch.equal(sample(windowed, **size), dense)


@pytest.mark.parametrize(
    "precision", [pytest.param(p, marks=[] if p == "int8" else pytest.mark.host_on_gpu) for p in PRECISION_BOUNDS]
)
def test_precisions(comfy, model, dtype, sample, store, precision):
    if BACKEND == "triton":
        reason = resolve("triton", torch.device(DEVICE), dtype, 128, PRECISIONS[precision]).reason
        if reason is not None:
            pytest.skip(f"{precision}: {reason}")
    outs = []
    for one, source in (("16bit", IN_PASSING), (precision, "plan found")):
        patched = comfy.patched(model, store=store, dense_steps=2, precision=one, **SPARSE)
        outs.append(sample(patched))
        check(comfy.report(patched), 2, source)
        assert comfy.report(patched).precision == one
    error = relative_error(outs[1], outs[0])
    print(f"{precision}: relative error {error:.2e}")
    assert error < PRECISION_BOUNDS[precision]


def test_dense_steps_on_paros_kernel(comfy, model, sample, store):
    patched = comfy.patched(model, store=store, dense_steps=2, dense_attention="paro", precision="int8", **SPARSE)
    error = relative_error(sample(patched), sample(model))
    assert error < NEAR
    check(comfy.report(patched), 2, IN_PASSING)


@pytest.mark.host_on_gpu
@pytest.mark.parametrize("batch, cfg", [(1, 1.0), (2, 3.0)])
def test_dense_steps_by_cudnn_where_it_is_faster(comfy, model, dtype, sample, monkeypatch, batch, cfg):
    """The same to rounding as the host's own; where it does not serve, or another attention was chosen, the host's."""
    asked = []

    def counted(*call, **rest):
        asked.append(call[0].shape)
        return cudnn.cudnn_attention(*call, **rest)

    monkeypatch.setattr(dense, "cudnn_attention", counted)
    monkeypatch.setattr(dense, "CUDNN_FASTER_FROM", {(major, 128): 1 for major in range(20)})
    size = {"batch": batch, "cfg": cfg}
    settings = {**COMMON, "density": 0.4, "dense_steps": STEPS}
    out = sample(comfy.patched(model, **settings), **size)
    q = torch.zeros(1, 2, 256, 128, dtype=dtype, device=DEVICE)
    if not cudnn.cudnn_serves(q, q, q):
        pytest.skip("torch has no cuDNN attention for this GPU")
    assert len(asked) >= STEPS * LAYERS
    expected = sample(model, **size)
    error = relative_error(out, expected)
    assert error < rounding(dtype, cfg)
    asked.clear()
    assert torch.equal(sample(comfy.patched(model, **{**settings, "dense_attention": "host"}), **size), expected)
    assert not asked
