"""Whatever of PARO's outlives a call is allocated where the host does not record what is allocated."""

from contextlib import nullcontext

import pytest
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.run import evaluation as evaluation_module
from comfyui_paro.tests.allocations import SITES, Recorder, forget_everything, recorded_run


def nothing_is_left(recorder, *reports):
    assert all(report.calls["sparse"] and not report.fallbacks for report in reports)
    # `empty_output`, and the dense attention of `recorded_run`.
    assert "pattern.py" in recorder.places and recorder.places <= {"pattern.py", "allocations.py"}


@pytest.mark.parametrize("backend, sites", [("reference", SITES), ("triton", SITES[:1])])
def test_only_results_are_recorded_and_none_outlives_its_call(backend, sites):
    forget_everything()
    recorder, dense = Recorder(), "paro" if backend == "triton" else "host"
    report = recorded_run(recorder.recording, recorder.pause, backend, sites=sites, dense_attention=dense).finish()
    # A plan of pure noise, masks measured in the run, biases.
    assert report.plan_source == "calibrated on the way" and report.sites_routed == len(sites)
    assert report.attention_error and report.backend == backend
    nothing_is_left(recorder, report)


def test_with_plans_found_and_moved(tmp_path):
    recorder, store = Recorder(), PlanStore([], tmp_path)
    recorded_run(recorder.recording, recorder.pause, "reference", store=store).finish()
    forget_everything()
    found = recorded_run(recorder.recording, recorder.pause, "reference", store=store).finish()
    moved = recorded_run(
        recorder.recording, recorder.pause, "reference", plan=found.plan, layout=TokenLayout(3, (3, 9, 11), 2)
    ).finish()
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
        recorded_run(recorder.recording, unpaused(monkeypatch, recorder, name), "reference")
