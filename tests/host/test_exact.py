"""PARO at density 1 and 16 bit is the unpatched model up to rounding, and gone when its node is gone."""

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.plan.orders import AXIS_ORDERS

pytestmark = pytest.mark.host_on_cpu

ODD, FLAT, WIDE = (5, 7, 9), (1, 17, 13), (3, 17, 11)
EXACT = {"preset": "custom", "density": 1.0, "precision": "16bit", "tail": "off", "dense_steps": 0}
# Both sides compute in float32; sums over some hundred keys in another order, amplified by three steps of guidance.
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.mark.parametrize("order", AXIS_ORDERS)
def test_every_order(comfy, wan, order):
    grid = ODD
    plan = comfy.full_plan(wan, "wan", TokenLayout(0, grid), order, comfy.wan_sites())
    model = comfy.patched(wan, plan=plan, **EXACT)
    torch.testing.assert_close(comfy.sample(model, grid), comfy.sample(wan, grid), **CLOSE)
    report = comfy.report(model)
    assert report.calls == {"sparse": 3 * comfy.LAYERS}, report.text()
    assert report.orders_histogram == {order: comfy.LAYERS * comfy.HEADS}
    assert not report.fallbacks and not report.passed


@pytest.mark.parametrize("grid", [ODD, FLAT, WIDE])
@pytest.mark.parametrize("batch, cfg", [(1, 1.0), (1, 3.0), (2, 3.0)])
def test_grids_batches_guidance(comfy, wan, store, grid, batch, cfg):
    """Calibrated on the way: the first step dense, the others through the kernel with every block kept."""
    model = comfy.patched(wan, store=store, **EXACT)
    options = {"batch": batch, "cfg": cfg}
    torch.testing.assert_close(comfy.sample(model, grid, **options), comfy.sample(wan, grid, **options), **CLOSE)
    report = comfy.report(model)
    assert (report.grid, report.prefix, report.suffix) == (grid, 0, 0)
    assert report.density == 1.0 and report.sites == report.sites_sparse == comfy.LAYERS
    assert not report.fallbacks and not report.passed
    assert len(store.names()) == 1


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "uni_pc"])
def test_samplers(comfy, wan, store, sampler):
    model = comfy.patched(wan, store=store, **EXACT)
    options = {"sampler": sampler, "steps": 4}
    torch.testing.assert_close(comfy.sample(model, FLAT, **options), comfy.sample(wan, FLAT, **options), **CLOSE)
    assert comfy.report(model).sites_sparse == comfy.LAYERS


@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("order", ["FHW", "FWH"])
def test_flux_with_text_and_references(comfy, flux, order, references):
    """Text in front, reference images (one of another size) behind; both untouched."""
    grid, sizes = (1, 15, 13), [(12, 10), (9, 14)][:references]
    extra = {"reference_latents": [torch.randn(1, 16, *size) for size in sizes]} if sizes else {}
    suffix = sum(-(-h // 2) * -(-w // 2) for h, w in sizes)
    layout = TokenLayout(comfy.TEXT_TOKENS, grid, suffix)
    plan = comfy.full_plan(flux, "flux", layout, order, comfy.flux_sites())
    model = comfy.patched(flux, plan=plan, **EXACT)
    options = {"video": False, "cfg": 1.0, **extra}
    torch.testing.assert_close(comfy.sample(model, grid, **options), comfy.sample(flux, grid, **options), **CLOSE)
    report = comfy.report(model)
    assert (report.prefix, report.grid, report.suffix) == (comfy.TEXT_TOKENS, grid, suffix)
    assert report.calls == {"sparse": 3 * len(comfy.flux_sites())} and not report.passed


def test_patching_leaves_the_model_alone(comfy, wan, store):
    """Bit-equal before, between and after patched runs; a plan saved by one run is found by the next."""
    before = comfy.sample(wan, ODD)
    model = comfy.patched(wan, store=store, preset="custom", density=0.4, dense_steps=1)
    first = comfy.sample(model, ODD)
    assert not torch.equal(first, before)
    assert comfy.report(model).calibration_seconds > 0
    assert torch.equal(comfy.sample(wan, ODD), before)
    other = comfy.sample(model, FLAT, seed=3)
    assert torch.isfinite(other).all()
    assert torch.equal(comfy.sample(wan, ODD), before)
    assert torch.equal(comfy.sample(model, ODD), first)
    assert comfy.report(model).calibration_seconds == 0 and comfy.report(model).plan_source == "plan found"


def test_a_second_node_replaces_the_first(comfy, wan, store):
    """Patching a patched model runs PARO once, with the last settings; wrappers do not pile up."""
    twice = comfy.patched(comfy.patched(wan, store=store, preset="fast"), store=store, **EXACT)
    torch.testing.assert_close(comfy.sample(twice, ODD), comfy.sample(wan, ODD), **CLOSE)
    assert comfy.report(twice).calls["sparse"] == 3 * comfy.LAYERS
