"""A GPU's faults while a run is going on: no memory, errors of launches, threads and streams at once, small cards.

Everything but streams and limits of memory also runs on the CPU with the PyTorch reference, so that it stays true.

Not here: an assertion that fails on the device itself. It takes the process's context of the GPU with it, and no code,
PARO's or the host's, can compute anything in that process afterwards.
"""

from __future__ import annotations

import random
import threading
from contextlib import nullcontext

import pytest
import torch
from comfyui_paro.paro_runtime.compiling import self_check
from comfyui_paro.paro_runtime.run import evaluation
from comfyui_paro.scripts.fuzz import GUARDS
from comfyui_paro.tests.allocations import forget_everything
from comfyui_paro.tests.host.cases import BACKEND, DEVICE, relative_error
from comfyui_paro.tests.host.failing import OutOfMemory, Raising

GRID = (3, 7, 9)
STEPS = 4
SPARSE = {"preset": "custom", "density": 0.4, "dense_steps": 1, "backend": BACKEND, "strict": False}
# Runs in which memory is out once, at another place each; scripts/fuzz.py takes all.
MOST = 120 if DEVICE == "cuda" else 12


@pytest.fixture
def run(comfy, wan):
    """A short run: the result, and its report where the model is a patched one."""

    def sample(model=None, **settings):
        model = comfy.patched(wan, **SPARSE, **settings) if model is None else model
        return comfy.sample(model, GRID, steps=STEPS, cfg=1.0), comfy.report(model)

    return sample


@pytest.fixture
def short_of_memory(host_path, run, monkeypatch):
    """Runs with allocations of these numbers failing, the process having forgotten what it kept."""

    def sample(fails=range(0)):
        monkeypatch.setattr(self_check, "_checked", {})
        forget_everything()
        memory = OutOfMemory(DEVICE, host_path, fails)
        with memory:
            found = run()
        return memory, *found

    sample()  # what is loaded once, kernels for one, is there from then on
    return sample


def told(report) -> str:
    """Every reason and note of a report, or why there is none."""
    if isinstance(report, str):
        return report
    return " | ".join([*report.notes, *(reason for reason, _ in (*report.fallbacks, *report.passed))])


def test_memory_is_out_once(wan, run, short_of_memory):
    dense, _ = run(wan)
    counted, whole, report = short_of_memory()
    assert report.calls == {"sparse": 6, "dense step": 2} and not torch.equal(whole, dense)
    for number in counted.first_of_each_place(MOST):
        memory, out, report = short_of_memory(range(number, number + 1))
        where = f"allocation {number} at {counted.places[number]}: {told(report)}"
        assert memory.failed and torch.isfinite(out).all(), where
        # What fails after the sampling, or has another way to the same, changes nothing.
        if not torch.equal(out, whole):
            assert "OutOfMemory" in told(report), where
            assert report.calls.get("sparse", 0) > 0 or torch.equal(out, dense), where


def test_a_function_that_raises(comfy, wan, monkeypatch):
    """Any of PARO's own, but for those that are the guard; scripts/fuzz.py takes any call of them."""

    def sample(fault):
        monkeypatch.setattr(self_check, "_checked", {})
        forget_everything()
        model = comfy.patched(wan, **SPARSE)
        with fault:
            return comfy.sample(model, GRID, steps=STEPS, cfg=1.0)

    counted = Raising()
    sample(counted)
    places = sorted(place for place in counted.calls if place[1] not in GUARDS)
    assert len(places) > 200
    for place in random.Random(0).sample(places, MOST):
        fault = Raising(RuntimeError("a fault that was put here"), place)
        out = sample(fault)
        assert fault.failed and torch.isfinite(out).all(), place


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_memory_is_out_for_good(wan, run, short_of_memory, share):
    """From some moment on; the host's own attention goes on."""
    dense, _ = run(wan)
    first = int(share * len(short_of_memory()[0].places))
    memory, out, report = short_of_memory(range(first, 1 << 40))
    assert memory.failed and torch.isfinite(out).all() and "OutOfMemory" in told(report)
    assert first or torch.equal(out, dense)


@pytest.mark.parametrize("number, lost", [(0, 3), (3, 2), (5, 1)])
def test_a_launch_that_raises(run, monkeypatch, number, lost):
    """The first, a middle and the last sparse call of six: its site is dense from there on, the others stay sparse."""
    calls, kernel = [], evaluation.run_kernel

    def launch(*args, **kwargs):
        calls.append(1)
        if len(calls) == number + 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")
        return kernel(*args, **kwargs)

    whole, _ = run()
    monkeypatch.setattr(evaluation, "run_kernel", launch)
    out, report = run()
    assert torch.isfinite(out).all() and not torch.equal(out, whole)
    assert report.calls == {"sparse": 6 - lost, "dense step": 2} and len(calls) == 7 - lost
    ((reason, count),) = report.fallbacks
    assert count == lost and reason.startswith(f"double.{number % 2}.0: RuntimeError: CUDA error: an illegal")
    assert "\n" not in reason
    monkeypatch.setattr(evaluation, "run_kernel", kernel)
    assert torch.equal(run()[0], whole)


@pytest.mark.parametrize("streams", [False, pytest.param(True, marks=pytest.mark.host_on_gpu)])
def test_two_threads_at_once(comfy, wan, wan_file, monkeypatch, streams):
    """Each sampling of two patched models, with settings of their own, is what it is alone; on one stream, and on two.
    Loaded twice: of two clones of one loaded model the host takes the patcher away from under the one that ends last.
    """
    empty, steps = comfy.latent(GRID), 6
    noise = comfy.comfy.sample.prepare_noise(empty, 0)  # the host draws it from one generator of the process
    both = zip((wan, comfy.load(wan_file)), (0.3, 0.6), strict=True)
    models = [comfy.patched(model, **{**SPARSE, "density": density}) for model, density in both]
    begin, loading = threading.Barrier(2, timeout=60), threading.Lock()
    management = comfy.comfy.model_management
    load = management.load_models_gpu

    def one_at_a_time(*args, **kwargs):
        with loading:
            return load(*args, **kwargs)

    # The host goes through its list of loaded models without a lock, and another thread may shorten it meanwhile.
    monkeypatch.setattr(management, "load_models_gpu", one_at_a_time)

    @torch.inference_mode()
    def sample(number):
        where = torch.cuda.stream(torch.cuda.Stream()) if streams else nullcontext()
        given = ("euler", "simple", comfy.text(1), comfy.text(2), empty)
        with where:
            return comfy.comfy.sample.sample(models[number], noise, steps, 1.0, *given, disable_pbar=True, seed=0)

    def together(number, found):
        begin.wait()
        found[number] = sample(number), comfy.report(models[number])

    alone = [sample(number) for number in range(2)]
    assert not torch.equal(*alone)
    for _ in range(3):
        found: dict = {}
        threads = [threading.Thread(target=together, args=(number, found)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for number in range(2):
            out, report = found[number]
            assert torch.equal(out, alone[number])
            assert report.calls == {"sparse": 10, "dense step": 2} and not report.fallbacks


@pytest.mark.host_on_gpu
@pytest.mark.parametrize("gigabytes, state", [(24, "LOW_VRAM"), (12, "NO_VRAM")])
def test_a_small_card(comfy, wan, wan_file, run, monkeypatch, gigabytes, state):
    """As much memory as such a card has, and the host's states for them: with NO_VRAM no weight stays on the GPU."""
    import comfy.model_management as management

    whole, expected = run(wan)[0], run()
    assert expected[1].calls == {"sparse": 6, "dense step": 2}
    management.unload_all_models()
    monkeypatch.setattr(management, "vram_state", management.VRAMState[state])
    monkeypatch.setattr(management, "lowvram_available", True)
    limited = comfy.load(wan_file)
    share = gigabytes * (1 << 30) / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        dense, _ = run(limited)
        out, report = run(comfy.patched(limited, **SPARSE))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        management.unload_all_models()
    assert report.calls == expected[1].calls and not report.fallbacks, report.text()
    # The same to the bit wherever the host's own run is.
    assert torch.equal(out, expected[0]) or 0 < relative_error(dense, whole) < 0.05
    assert relative_error(out, expected[0]) < 0.1
