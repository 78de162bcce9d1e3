"""Whatever of PARO's outlives a call is allocated where the host does not record what is allocated."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from comfyui_paro.paro_runtime import evaluation as evaluation_module
from comfyui_paro.paro_runtime.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.plan_store import PlanStore
from comfyui_paro.paro_runtime.recipes import recipe_for
from comfyui_paro.paro_runtime.session import Policy, Session
from comfyui_paro.paro_runtime.settings import Settings
from comfyui_paro.paro_runtime.tokens import TokenLayout
from comfyui_paro.tests.allocations import Recorder, forget_everything
from torch.nn.functional import scaled_dot_product_attention as sdpa

SIGMAS = [1.0, 0.8, 0.6, 0.0]
LAYOUT = TokenLayout(3, (3, 7, 11), 2)
SITES = [Site("double", i) for i in range(2)]


def run(recorder, lasting, backend, store=None, plan=None, layout=LAYOUT, sites=SITES, **settings) -> Session:
    """Every step and site of a run, in which each evaluation is recorded."""
    common = {"preset": "custom", "density": 0.4, "strict": True, "min_tokens": 0, "dense_steps": 1}
    settings = Settings(**{**common, "backend": backend, **settings})
    policy = Policy(ModelIdentity("wan", "a" * 16, "b" * 16), recipe_for("wan"), settings, plan, store)
    session = Session(policy, sigmas=SIGMAS, lasting=lasting)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, layout.length, 32, generator=generator).half()
    # Queries that move with their place: corrections are worth it.
    places = torch.cartesian_prod(*(torch.linspace(-1, 1, size) for size in layout.grid))
    q *= 0.3
    q[:, :, 3:-2] += 0.5 * (places @ torch.randn(1, 2, 3, 32, generator=generator)).half()
    for sigma in SIGMAS[:-1]:
        evaluation = session.begin(layout=layout, sigma=sigma)
        with recorder.recording():
            for site in sites:
                evaluation.attend(site, q, k, v, dense=lambda: sdpa(q, k, v))
        assert not evaluation.end()
    return session


def nothing_is_left(recorder, *reports):
    assert all(report.calls["sparse"] and not report.fallbacks for report in reports)
    # `empty_output`, and this file's dense attention.
    assert "problem.py" in recorder.places and recorder.places <= {"problem.py", Path(__file__).name}


@pytest.mark.parametrize("backend, sites", [("reference", SITES), ("triton", SITES[:1])])
def test_only_results_are_recorded_and_none_outlives_its_call(backend, sites):
    forget_everything()
    recorder, dense = Recorder(), "paro" if backend == "triton" else "host"
    report = run(recorder, recorder.pause, backend, sites=sites, dense_attention=dense).finish()
    # A plan of pure noise, masks measured anew, biases, corrections made and carried.
    assert report.plan_source == "calibrated on the way" and report.sites_looked_at_again == len(sites)
    assert report.heads_corrected and report.backend == backend
    nothing_is_left(recorder, report)


def test_with_plans_found_and_moved(tmp_path):
    recorder, store = Recorder(), PlanStore([], tmp_path)
    run(recorder, recorder.pause, "reference", store).finish()
    forget_everything()
    found = run(recorder, recorder.pause, "reference", store).finish()
    moved = run(recorder, recorder.pause, "reference", plan=found.plan, layout=TokenLayout(3, (3, 9, 11), 2)).finish()
    assert (found.plan_source, moved.plan_source) == ("plan found", "given plan, moved to this grid")
    nothing_is_left(recorder, found, moved)


def unpaused(monkeypatch, recorder, name):
    """The recorder's pause, but for one method of `Evaluation`."""
    method, inside = getattr(evaluation_module.Evaluation, name), []

    def watched(self, *args, **more):
        inside.append(name)
        try:
            return method(self, *args, **more)
        finally:
            inside.pop()

    monkeypatch.setattr(evaluation_module.Evaluation, name, watched)
    return lambda: nullcontext() if inside else recorder.pause()


@pytest.mark.parametrize("name", ["attend", "_observe", "_guarded"])
def test_the_recorder_sees_what_is_left_behind(monkeypatch, name):
    forget_everything()
    recorder = Recorder()
    with pytest.raises(AssertionError, match="memory outlives the forward"):
        run(recorder, unpaused(monkeypatch, recorder, name), "reference")
