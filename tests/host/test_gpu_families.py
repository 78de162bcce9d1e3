"""Every supported architecture in the real sampler on a GPU, in 16 bits: exact at density 1, sparse where intended.

Without a GPU one of them runs on the CPU with the PyTorch reference, so that this file stays true.
"""

from __future__ import annotations

import pytest
import torch
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.tests.host.cases import BACKEND, DEVICE, check, describe, relative_error
from comfyui_paro.tests.host.cases_image import CASES as IMAGE_CASES
from comfyui_paro.tests.host.cases_video import CASES as VIDEO_CASES

CASES = {case.name: case for case in (*VIDEO_CASES, *IMAGE_CASES)}
EVERYWHERE = "wan_t2v"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMMON = {"preset": "custom", "backend": BACKEND, "min_tokens": 0}
EXACT = {"density": 1.0, "precision": "16bit", "tail": "off", "dense_steps": 0, "dense_attention": "host", **COMMON}
SPARSE = {"density": 0.4, "dense_steps": 1, **COMMON}
# Two sparse steps after a dense one, each with masks of its own.
STEPS = 3


def build(tiny, name: str, dtype: torch.dtype):
    """The case and its model; skipped, with a line, where this host has not got all that it takes."""
    case = CASES[name]
    if not tiny.known(case):
        pytest.skip(f"this ComfyUI has no {case.config}")
    try:
        return case, tiny.build(case, dtype, DEVICE)
    except FileNotFoundError as error:
        pytest.skip(f"this copy of ComfyUI lacks a file: {error}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == EVERYWHERE else pytest.mark.host_on_gpu) for name in CASES]
)
def test_family(comfy, tiny, tmp_path, name, dtype):
    from comfyui_paro.paro_runtime.host.patching import remove

    case, model = build(tiny, name, DTYPES[dtype])
    plans = []
    for number, run in enumerate(tiny.runs(case)):
        size = {"steps": STEPS, "batch": run.batch}
        dense = tiny.sample(model, case, run, **size)
        finite = torch.isfinite(dense).all()
        assert finite
        exact = comfy.patched(model, **EXACT)
        error = relative_error(tiny.sample(exact, case, run, **size), dense)
        check(comfy.report(exact), case, run, EXACT["dense_steps"], STEPS)
        # Two ways to round the attention; what they do to the result is about half a unit of the dtype.
        assert error < 2 * torch.finfo(DTYPES[dtype]).eps

        store = PlanStore([], tmp_path / str(number))
        # The plan is made in passing, of pure noise, and then found. Kernels differ by precision, the plan does not.
        for precision, source in (("auto", "calibrated on the way"), ("int8", "plan found")):
            sparse = comfy.patched(model, store=store, precision=precision, **SPARSE)
            out = tiny.sample(sparse, case, run, **size)
            report = comfy.report(sparse)
            check(report, case, run, SPARSE["dense_steps"], STEPS)
            difference = relative_error(out, dense)
            assert 0 < difference < 0.5
            assert (report.plan_source, report.sites_routed) == (source, report.sites)
            assert report.backend == BACKEND and report.device.startswith(DEVICE)

        # One made for another grid and the same sites.
        plan = next((p for p in plans if p.layout.grid != report.grid and len(p.sites) == report.sites), None)
        plans += [store.load(name) for name in store.names()]
        if plan is not None:
            moved = comfy.patched(model, plan=plan, **SPARSE)
            difference = relative_error(tiny.sample(moved, case, run, **size), dense)
            assert 0 < difference < 0.5
            report = comfy.report(moved)
            assert describe(report) == run.layout and "moved from the grid" in report.notes[0]
            assert report.sites_sparse == report.sites and not report.passed and not report.fallbacks, report.text()
        for unpatched in (remove(sparse), model):
            assert torch.equal(tiny.sample(unpatched, case, run, **size), dense)
