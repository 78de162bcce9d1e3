"""A plan moved on the GPU is the plan moved on the CPU, but for ties."""

import pytest
import torch
from comfyui_paro.paro_runtime.calibration import Calibrator
from comfyui_paro.paro_runtime.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.portability import move_plan
from comfyui_paro.paro_runtime.recipes import MaskOptions
from comfyui_paro.paro_runtime.tokens import TokenLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: moving on hardware is not tested"),
]


def test_as_on_the_cpu():
    old, new = TokenLayout(0, (5, 13, 11)), TokenLayout(0, (5, 18, 16))
    calibrator = Calibrator(ModelIdentity("wan", "a", "b"), MaskOptions(0.3, "mass", "shared", 64))
    for index in range(2):
        q, k, v = torch.randn(3, 1, 4, old.length, 64)
        calibrator.observe(Site("double", index), old, q, k, v)
    plan = calibrator.plan({})
    here, there = move_plan(plan, new), move_plan(plan, new, "cuda")
    for site, entry in here.sites.items():
        assert there.sites[site].orders == entry.orders
        assert there.sites[site].packed.device.type == "cpu"
        for group in range(entry.groups):
            different = there.sites[site].mask(group=group) != entry.mask(group=group)
            assert different.float().mean() < 0.02
        torch.testing.assert_close(there.sites[site].mass_kept, entry.mass_kept, atol=1e-2, rtol=1e-2)
