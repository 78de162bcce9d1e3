"""Results that are not finite, through the real host: the evaluation is made again, and only that one."""

import math

import pytest
import torch
from comfyui_paro.paro_runtime.host import wrappers
from comfyui_paro.paro_runtime.run import evaluation as evaluation_module
from comfyui_paro.paro_runtime.run.session import Session

GRID = (5, 7, 9)
STEPS, SPARSE_STEPS = 5, 4
SPARSE = {"preset": "custom", "density": 0.4, "dense_steps": 1, "strict": False}


@pytest.fixture
def evaluations(monkeypatch):
    """Steps of the evaluations, and whether the step before was evaluated already: (step, again)."""
    seen, begin = [], Session.begin

    def watched(self, **given):
        evaluation = begin(self, **given)
        seen.append((evaluation.step, evaluation.step in {step for step, _ in seen}))
        return evaluation

    monkeypatch.setattr(Session, "begin", watched)
    return seen


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(n)`: the n-th call of PARO's kernel from now on, counted from 0, gets values that are not finite."""
    run_kernel = evaluation_module.run_kernel

    def spoil(*numbers):
        calls = iter(range(1000))

        def spoiled(q, k, v, *rest, **more):
            return run_kernel(q, k, v * torch.nan if next(calls) in numbers else v, *rest, **more)

        monkeypatch.setattr(evaluation_module, "run_kernel", spoiled)

    return spoil


def at_once(monkeypatch):
    """Every call looks at its own result, as it must where an evaluation cannot be made again."""
    monkeypatch.setattr(wrappers, "repeatable", lambda model, options: False)


# Sparse steps 0, 1 and 3 measure masks and biases; 2 measures nothing.
@pytest.mark.parametrize("sparse_step", range(SPARSE_STEPS))
@pytest.mark.parametrize("layer", [0, 1])
def test_the_evaluation_is_made_again_and_only_that_one(
    comfy, wan, spoil, evaluations, monkeypatch, sparse_step, layer
):
    spoil(sparse_step * comfy.LAYERS + layer)
    model = comfy.patched(wan, **SPARSE)
    out, report = comfy.sample(model, GRID, steps=STEPS), comfy.report(model)
    again = 1 + sparse_step
    once = [(step, False) for step in range(STEPS)]
    assert evaluations == [*once[: again + 1], (again, True), *once[again + 1 :]]
    left = SPARSE_STEPS - sparse_step
    assert report.fallbacks == [(f"double.{layer}.0: the result is not finite", left)] and not report.passed
    assert report.calls == {"sparse": SPARSE_STEPS * comfy.LAYERS - left, "dense step": comfy.LAYERS}
    assert report.sites_sparse == comfy.LAYERS - (sparse_step == 0)
    # As if each call had looked at its own result: nothing remembers the attempt that failed.
    evaluations.clear()
    at_once(monkeypatch)
    spoil(sparse_step * comfy.LAYERS + layer)
    model = comfy.patched(wan, **SPARSE)
    expected = comfy.sample(model, GRID, steps=STEPS)
    assert torch.isfinite(out).all() and evaluations == once
    assert torch.equal(out, expected)
    seen = comfy.report(model)
    assert (seen.calls, seen.fallbacks, seen.sites_sparse) == (report.calls, report.fallbacks, report.sites_sparse)
    # What is thrown away is no error of the run.
    assert all(map(math.isfinite, (*seen.attention_error, *report.attention_error)))
    dense = comfy.sample(wan, GRID, steps=STEPS)
    assert (out - dense).norm() < 0.5 * dense.norm()


def test_a_model_that_never_gives_finite_results_ends_dense(comfy, wan, spoil, evaluations):
    spoil(*range(1000))
    model = comfy.patched(wan, **SPARSE)
    assert torch.equal(comfy.sample(model, GRID), comfy.sample(wan, GRID))
    assert evaluations == [(0, False), (1, False), (1, True), (1, True), (2, False)]
    report = comfy.report(model)
    assert report.calls == {"sparse": 0, "dense step": comfy.LAYERS} and report.sites_sparse == 0


def test_dense_attention_of_paro_is_given_up_before_anything_is_observed(comfy, wan, spoil, evaluations):
    spoil(0)  # of the dense step, which calibrates
    settings = {**SPARSE, "dense_attention": "paro"}
    model = comfy.patched(wan, **settings)
    out = comfy.sample(model, GRID)
    report = comfy.report(model)
    assert evaluations == [(0, False), (0, True), (1, False), (2, False)]
    assert report.fallbacks == [("dense attention: the result is not finite", 1)] and torch.isfinite(out).all()
    assert report.calls == {"sparse": 2 * comfy.LAYERS, "dense step": comfy.LAYERS}
    # As if the host's attention had been asked for: what follows from the bad result was not observed.
    assert torch.equal(out, comfy.sample(comfy.patched(wan, **SPARSE), GRID))


@pytest.mark.parametrize("kind", ["apply_model", "diffusion_model"])
def test_nothing_of_another_node_runs_twice(comfy, wan, spoil, evaluations, kind):
    ran = []

    def counts(executor, *args, **kwargs):
        ran.append(1)
        return executor(*args, **kwargs)

    spoil(2)
    model = comfy.patched(wan, **SPARSE)
    model.add_wrapper_with_key(kind, "counts", counts)
    assert torch.isfinite(comfy.sample(model, GRID)).all()
    assert len(ran) == len(evaluations) == 3
    assert comfy.report(model).fallbacks == [("double.0.0: the result is not finite", 1)]


def test_strict_stops(comfy, wan, spoil):
    spoil(3)
    with pytest.raises(FloatingPointError, match=r"^double\.1\.0: the result is not finite$"):
        comfy.sample(comfy.patched(wan, **{**SPARSE, "strict": True}), GRID)
