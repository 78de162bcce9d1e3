"""A plan from another grid: what stays of it, and a run that was given one measures its masks itself."""

from dataclasses import replace

import pytest
import torch
from comfyui_paro.bench.paro_bench.generator import HARD, TEXT, make_problem
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.options import MaskOptions
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.run import evaluation as evaluation_module
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session
from torch.nn.functional import scaled_dot_product_attention as sdpa

IDENTITY = ModelIdentity("wan", "a" * 16, "b" * 16)
SITE = Site("double", 0)
OLD, NEW, IMAGE = (7, 9, 8), (7, 10, 9), (1, 25, 26)
SIGMAS = [1.0, 0.7, 0.4, 0.2, 0.0]


def calibrated(grid):
    """Of another sample than the one that runs see."""
    problem = make_problem(grid, HARD)
    calibrator = Calibrator(IDENTITY, MaskOptions(0.3, "mass", "shared", 64, 0.0, "falling"))
    calibrator.observe(SITE, TokenLayout(TEXT, grid), problem.q[1:2], problem.k[1:2], problem.v[1:2])
    return calibrator.plan({"by": "test"})


@pytest.fixture(scope="module")
def plan():
    return calibrated(OLD)


@pytest.fixture
def patterns(monkeypatch):
    """Those that the kernel is given, in the order of the calls."""
    given, run_kernel = [], evaluation_module.run_kernel

    def watch(q, k, v, pattern, *rest, **more):
        given.append(pattern)
        return run_kernel(q, k, v, pattern, *rest, **more)

    monkeypatch.setattr(evaluation_module, "run_kernel", watch)
    return given


def run(plan, q, k, v, grid=NEW, identity=IDENTITY):
    """What came of each step, None where it was dense, and the report."""
    settings = Settings(preset="custom", density=0.3, dense_steps=1, precision="16bit", strict=True)
    session = Session(Policy(identity, recipe_for("wan"), settings, plan), sigmas=SIGMAS)
    results = []
    for sigma in SIGMAS[:-1]:
        dense = sdpa(q, k, v, enable_gqa=True)
        evaluation = session.begin(layout=TokenLayout(TEXT, grid), sigma=sigma)
        out = evaluation.attend(SITE, q, k, v, dense=lambda d=dense: d)
        results.append(None if out is dense else out)
        evaluation.end()
    return results, session.finish()


def error(out, q, k, v):
    dense = sdpa(q, k, v)
    return ((out - dense).norm() / dense.norm()).item()


def test_orders_budgets_and_biases_stay_and_masks_go(plan):
    moved, entry = plan.moved(TokenLayout(5, NEW, 2)), plan.sites[SITE]
    its = moved.sites[SITE]
    assert moved.layout == TokenLayout(5, NEW, 2) and moved.made == {**plan.made, "moved_from": "7x9x8"}
    assert entry.has_masks and not its.has_masks and its.groups == moved.groups == 3
    assert its.shape == (12, 10, 10) and moved.block_q == 64
    assert its.orders == entry.orders and its.rotate == entry.rotate
    assert all(torch.equal(getattr(its, name), getattr(entry, name)) for name in ("density", "tail_bias", "mass_kept"))
    large = plan.moved(TokenLayout(0, (13, 30, 52)))
    assert large.block_q == 128 and large.sites[SITE].shape == (12, 159, 317)


def test_on_the_same_grid_masks_stay_whatever_stands_beside_it(plan):
    beside = plan.moved(TokenLayout(9, OLD, 1))
    assert beside.layout == TokenLayout(9, OLD, 1) and beside.sites is plan.sites and beside.made == plan.made


def test_a_run_measures_the_masks_of_a_moved_plan(plan, patterns):
    there = make_problem(NEW, HARD)
    tensors = there.q[:1], there.k[:1], there.v[:1]
    results, report = run(plan, *tensors)
    assert [out is None for out in results] == [True, False, False, False]
    assert report.plan_source == "given plan, moved to this grid" and report.grid == NEW
    assert report.sites_routed == 1 and not report.fallbacks
    assert report.notes == ["plan: moved from the grid 7x9x8, the run measures its masks"]
    entry = plan.sites[SITE]
    for group, pattern in enumerate(patterns):
        # Each head has as many blocks as on the grid that the plan was made on; every row keeps one.
        torch.testing.assert_close(pattern.mask.float().mean((1, 2)), entry.density[group], atol=0.05, rtol=0)
        assert not torch.equal(pattern.tail_bias, entry.tail_bias[group])  # measured under those masks
    # The orders are worth moving: with the model's own there is more that so few blocks cannot hold.
    plain = replace(plan, sites={SITE: replace(entry, orders=("FHW",) * 12)})
    for moved, without in zip(results[1:], run(plain, *tensors)[0][1:], strict=True):
        assert error(moved, *tensors) < 0.9 * error(without, *tensors)


def test_a_plan_of_a_video_serves_an_image(plan):
    """Also where heads share keys, whose order they share; boxes give way to what fits."""
    entry = plan.sites[SITE]
    boxes = replace(plan, sites={SITE: replace(entry, orders=("4x4x4",) * 6 + ("HWF",) * 6)})
    there = make_problem(IMAGE, HARD)
    results, report = run(boxes, there.q[:1], there.k[:1, ::6], there.v[:1, ::6], IMAGE)
    assert all(out is not None for out in results[1:]) and report.sites_routed == 1 and not report.fallbacks
    assert report.plan.sites[SITE].orders == ("1x8x8",) * 6 + ("FHW",) * 6


def test_a_fine_tune_is_noted_and_another_architecture_refused(plan):
    there = make_problem(NEW, HARD)
    tensors = there.q[:1], there.k[:1], there.v[:1]
    _, report = run(plan, *tensors, identity=ModelIdentity("wan", "a" * 16, "c" * 16))
    assert any("fine-tune" in note for note in report.notes) and "moved" in report.plan_source
    results, report = run(plan, *tensors, identity=ModelIdentity("wan", "z" * 16, "b" * 16))
    assert report.plan_source == "calibrated on the way" and results[0] is None
    assert any("made for another wan model" in note for note in report.notes)
