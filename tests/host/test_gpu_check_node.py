"""PARO Check on a GPU: what is installed is measured, PARO's kernels among it, and errors are what they should be."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_paro.tests.host.cases import DEVICE

pytestmark = pytest.mark.host_on_gpu
GRID = (9, 32, 32)
# Largest relative L2 error of dense attention in 16 and in 8 bits.
NEAR_16, NEAR_8 = 1e-2, 8e-2


@pytest.fixture
def found(comfy, wan_file):
    from comfyui_paro.nodes.check.in_host import Wanted, check

    said: list[str] = []
    model = comfy.patched(comfy.load(wan_file, torch.bfloat16), preset="custom", density=0.3, dense_steps=2)
    made = check(Wanted(model, {"samples": comfy.latent(GRID)}, comfy.text(1), steps=10), said.append)
    assert any(line.startswith("checking: PARO with ") for line in said)
    return made


def test_everything_about_a_gpu(found):
    from comfyui_paro.nodes.check.chart import check_chart
    from comfyui_paro.nodes.check.text import check_text

    print(check_text(found))
    assert found.notes == () and found.kernels.ready, found.kernels
    assert found.machine["gpu"] == torch.cuda.get_device_name() and found.machine["triton"]
    rows = {(row.kind, row.density): row for row in found.rows if row.kind != "other"}
    host, dense, sparse = (rows[key] for key in (("host", 1.0), ("paro", 1.0), ("paro", found.outlook.density)))
    for row in (host, dense, sparse):
        assert row.ms > 0 and row.heads == found.size.heads and not row.reason, row
    assert host.error < NEAR_16 and dense.error < NEAR_8 and dense.error < sparse.error < 1
    for row in found.rows:
        assert (row.ms is None) == bool(row.reason) == (row.error is None), row
        if row.density == 1 and row.ms is not None:
            assert row.error < NEAR_8, row
    run = found.outlook
    assert not run.why_not and run.gain[0] <= run.gain[1] and sum(run.dense) == 2 and len(run.densities) == 8
    assert found.size.layout.describe() == "0 + 9x32x32 + 0" and found.size.dtype == torch.bfloat16
    made = json.loads(json.dumps(found.as_dict()))
    assert len(made["rows"]) == len(found.rows)
    assert check_chart(found).isfinite().all()


def test_a_call_that_does_not_fit_is_told(comfy, wan_file, monkeypatch):
    """Sampling goes on after it: memory is given back."""
    from comfy import model_management
    from comfyui_paro.nodes.check.in_host import Wanted, check

    monkeypatch.setattr(model_management, "get_free_memory", lambda device: 1e5)
    model = comfy.patched(comfy.load(wan_file, torch.bfloat16))
    made = check(Wanted(model, {"samples": comfy.latent(GRID)}), lambda text: None)
    assert {row.reason for row in made.rows} == {"there is not enough free memory for one head"}


def test_memory_is_given_back(comfy, wan_file, found):
    import gc

    from comfyui_paro.nodes.check.in_host import Wanted, check

    model = comfy.patched(comfy.load(wan_file, torch.bfloat16))
    latent = {"samples": comfy.latent(GRID)}
    check(Wanted(model, latent), lambda text: None)
    gc.collect()
    before = torch.cuda.memory_allocated(DEVICE)
    check(Wanted(model, latent), lambda text: None)
    gc.collect()
    assert torch.cuda.memory_allocated(DEVICE) <= before + 2**20
