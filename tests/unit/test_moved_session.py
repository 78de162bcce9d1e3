"""A run that was given a plan from another grid: moved, measured on the first rows, kept or replaced."""

from dataclasses import replace

import pytest
import torch
from comfyui_paro.bench.paro_bench.generator import HARD, TEXT, make_problem
from comfyui_paro.paro_runtime.calibration import Calibrator
from comfyui_paro.paro_runtime.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.portability import MovedPlanCheck
from comfyui_paro.paro_runtime.recipes import MaskOptions, recipe_for
from comfyui_paro.paro_runtime.refresh import BiasRefresh
from comfyui_paro.paro_runtime.session import Policy, Session
from comfyui_paro.paro_runtime.settings import Settings
from comfyui_paro.paro_runtime.tokens import TokenLayout
from torch.nn.functional import scaled_dot_product_attention as sdpa

IDENTITY = ModelIdentity("wan", "a" * 16, "b" * 16)
SITE = Site("double", 0)
OLD, NEW = (7, 9, 8), (7, 10, 9)
SIGMAS = [1.0, 0.7, 0.4, 0.2, 0.0]


@pytest.fixture(scope="module")
def plan():
    problem = make_problem(OLD, HARD)
    calibrator = Calibrator(IDENTITY, MaskOptions(0.3, "mass", "shared", 64))
    calibrator.observe(SITE, TokenLayout(TEXT, OLD), problem.q[:1], problem.k[:1], problem.v[:1])
    return calibrator.plan({})


def run(plan, q, k, v, identity=IDENTITY, strict=True):
    settings = Settings(preset="custom", density=0.3, dense_steps=1, precision="16bit", strict=strict)
    session = Session(Policy(identity, recipe_for("wan"), settings, plan), sigmas=SIGMAS)
    kinds = []
    for sigma in SIGMAS[:-1]:
        dense = sdpa(q, k, v)
        evaluation = session.begin(layout=TokenLayout(TEXT, NEW), sigma=sigma)
        kinds.append(evaluation.attend(SITE, q, k, v, dense=lambda d=dense: d) is dense)
        evaluation.end()
    return kinds, session.finish()


def test_a_moved_plan_that_fits_is_used(plan):
    there = make_problem(NEW, HARD)
    was_dense, report = run(plan, there.q[:1], there.k[:1], there.v[:1])
    assert was_dense == [True, False, False, False]
    assert report.plan_source == "given plan, moved to this grid" and report.grid == NEW
    assert any("moved from the grid 7x9x8" in note for note in report.notes)


def test_a_moved_plan_that_does_not_fit_is_replaced(plan, monkeypatch):
    there, forgotten = make_problem(NEW, HARD), []
    monkeypatch.setattr(BiasRefresh, "forget", lambda self: forgotten.append(type(self)))
    was_dense, report = run(plan, torch.zeros_like(there.q[:1]), there.k[:1], there.v[:1])
    assert was_dense == [True, False, False, False]
    assert forgotten == [BiasRefresh]
    assert report.plan_source == "calibrated on the way"
    assert any(note.endswith("calibrating anew") for note in report.notes)


def test_a_plan_that_cannot_move_is_replaced(plan):
    there = make_problem(NEW, HARD)
    bare = replace(plan, sites={SITE: replace(plan.sites[SITE], falloff=None)})
    was_dense, report = run(bare, there.q[:1], there.k[:1], there.v[:1])
    assert was_dense == [True, False, False, False] and report.plan_source == "calibrated on the way"
    assert any("plan: serves its own size of " in note for note in report.notes)


def test_a_fine_tune_is_noted_and_another_architecture_refused(plan):
    there = make_problem(NEW, HARD)
    tensors = there.q[:1], there.k[:1], there.v[:1]
    _, report = run(plan, *tensors, identity=ModelIdentity("wan", "a" * 16, "c" * 16))
    assert any("fine-tune" in note for note in report.notes) and "moved" in report.plan_source
    was_dense, report = run(plan, *tensors, identity=ModelIdentity("wan", "z" * 16, "b" * 16))
    assert report.plan_source == "calibrated on the way" and was_dense[0]
    assert any("made for another wan model" in note for note in report.notes)


def test_trouble_in_measuring_a_moved_plan_does_not_end_the_run(plan, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr(MovedPlanCheck, "measure", fail)
    there = make_problem(NEW, HARD)
    was_dense, report = run(plan, there.q[:1], there.k[:1], there.v[:1], strict=False)
    assert was_dense == [True, False, False, False]
    assert any("could not be measured (RuntimeError: no memory)" in note for note in report.notes)
