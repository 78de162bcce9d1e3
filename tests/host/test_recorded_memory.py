"""On hosts that record the allocations of a forward PARO leaves nothing behind in it."""

import pytest
import torch
from comfyui_paro.tests.allocations import Recorder, forget_everything

GRID = (5, 7, 9)
SPARSE = {"preset": "custom", "density": 0.4, "dense_steps": 1}


@pytest.fixture
def recorder(comfy, wan, monkeypatch):
    """Records the forward of the tiny model as newer hosts do: its output is copied out of it."""
    host = pytest.importorskip("comfy.model_prefetch", reason="a host that knows no recording")
    recorder, model = Recorder(wan.load_device.type), type(wan.model.diffusion_model)
    forward = model.forward

    def recorded(*args, **kwargs):
        with recorder.recording():
            out = forward(*args, **kwargs)
            with recorder.pause():
                out = torch.clone(out)
        return out

    # On the class: a method that is replaced on the model itself is another node's, and not run twice.
    monkeypatch.setattr(model, "forward", recorded)
    monkeypatch.setattr(host, "pause_malloc_graph", recorder.pause, raising=False)
    return recorder


def test_a_run_in_passing_and_one_with_its_plan(comfy, wan, store, recorder):
    forget_everything()
    for source in ("calibrated on the way", "plan found"):
        model = comfy.patched(wan, store=store, **SPARSE)
        comfy.sample(model, GRID, steps=4)
        report = comfy.report(model)
        assert report.plan_source == source and report.sites_sparse == comfy.LAYERS and not report.fallbacks
    assert report.sites_routed == comfy.LAYERS


def test_without_the_host_s_pause_it_is_noticed(comfy, wan, store, recorder, monkeypatch):
    import comfy.model_prefetch as host

    monkeypatch.delattr(host, "pause_malloc_graph")
    forget_everything()
    with pytest.raises(AssertionError, match="memory outlives the forward"):
        comfy.sample(comfy.patched(wan, store=store, **SPARSE), GRID)
