"""On a GPU nothing of PARO's that a host records outlives its call, as torch tells and as the host's recorder does."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

PACK = Path(__file__).resolve().parent.parent.parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: lasting memory on it is not tested"),
]


def recorder_of_the_host() -> bool:
    """Whether comfy_aimdo is there in a version (0.5.3 and later) that records allocations."""
    return bool(importlib.util.find_spec("comfy_aimdo") and importlib.util.find_spec("comfy_aimdo.malloc_graph"))


def test_only_results_are_recorded():
    from comfyui_paro.tests.allocations import SITES, Recorder, forget_everything, recorded_run

    forget_everything()
    recorder = Recorder("cuda")
    report = recorded_run(recorder.recording, recorder.pause, "triton", device="cuda", dense_attention="paro").finish()
    assert report.sites_routed == report.sites_sparse == len(SITES) and report.attention_error
    assert "pattern.py" in recorder.places and recorder.places <= {"pattern.py", "allocations.py"}


@pytest.mark.skipif(not recorder_of_the_host(), reason="NO comfy_aimdo >= 0.5.3: its recorder did not look at PARO")
def test_the_recorder_of_newer_hosts_finds_nothing_left():
    """In a process of its own: the recorder takes torch's allocator over, and may abort."""
    env = {**os.environ, "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}
    env.pop("PYTORCH_CUDA_ALLOC_CONF", None)

    def left(how: str) -> int | None:
        """Allocations that outlived their evaluation; None if the recorder gave up over them."""
        done = subprocess.run([sys.executable, __file__, how], env=env, capture_output=True, text=True, timeout=300)
        return json.loads(done.stdout.splitlines()[-1])["left"] if done.returncode == 0 else None

    assert left("paused") == 0
    assert left("recorded") != 0


def _record(how: str) -> int:
    sys.path.insert(0, str(PACK / "scripts"))
    import _checkout
    import comfy_aimdo.control as aimdo
    import comfy_aimdo.malloc_graph as malloc_graph

    assert aimdo.init("cuda") and aimdo.init_device(0)
    torch.empty(1, device="cuda")
    _checkout.register()
    from comfyui_paro.tests.allocations import recorded_run

    graph = None

    @contextmanager
    def recording():
        nonlocal graph
        if graph is None:
            graph = malloc_graph.record(torch.cuda.current_stream())
        else:
            graph.push()
        yield
        graph.pop()

    @contextmanager
    def pause():
        graph.pause()
        try:
            yield
        finally:
            graph.resume()

    recorded_run(recording, pause if how == "paused" else nullcontext, "triton", device="cuda").finish()
    return graph.rogue_count


if __name__ == "__main__":
    print(json.dumps({"left": _record(sys.argv[1])}))
