"""What a run sees of a large grid stays on the GPU, and nothing waits for it before the plan is made."""

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.calibration import accumulator as sums_module
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator, Method
from comfyui_paro.paro_runtime.calibration.options import SHARED_TOKENS
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.options import MaskOptions
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: where sums are kept is not tested"),
]
LAYOUT = TokenLayout(5, (9, 30, 32), 3)
SITES = [Site("double", index) for index in range(3)]


def observed(criterion: str, waits: str = "default") -> Calibrator:
    """Three sites of six heads, three of them key heads; `waits`: what torch does about the last two's."""
    options = MaskOptions(0.3, "mass", "shared", 64, 0.0, "falling")
    calibrator = Calibrator(ModelIdentity("wan", "a", "b"), options, method=Method(criterion=criterion))
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.inference_mode():
        for number, site in enumerate(SITES):
            q, k, v = (
                torch.randn(2, LAYOUT.length, heads, 64, device="cuda", generator=generator).bfloat16().transpose(1, 2)
                for heads in (6, 3, 3)
            )
            torch.cuda.set_sync_debug_mode(waits if number else "default")
            try:
                calibrator.observe(site, LAYOUT, q, k, v)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return calibrator


@pytest.mark.parametrize("criterion", ["mass", "error"])
def test_observing_waits_for_nothing(criterion, monkeypatch):
    assert LAYOUT.grid_tokens > SHARED_TOKENS
    monkeypatch.setattr(sums_module, "FULL_PRECISION_ELEMENTS", 0)
    calibrator = observed(criterion, "error")
    for sums in calibrator._sums.values():
        assert all(tensor.is_cuda for tensor in sums.tensors().values())
        assert (sums.mass if criterion == "mass" else sums.error).dtype == torch.bfloat16


def test_the_plan_is_the_one_a_cpu_makes_of_the_same_sums(monkeypatch):
    """Thresholds from a sample, tables in 16 bits: rounding may move a block at the threshold, no more."""
    monkeypatch.setattr(sums_module, "FULL_PRECISION_ELEMENTS", 0)
    monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.mask_choice.THRESHOLD_VALUES", 20_000)
    calibrator = observed("error")
    there = calibrator.plan({})
    calibrator._device = torch.device("cpu")
    here = calibrator.plan({})
    for site in SITES:
        a, b = there.sites[site], here.sites[site]
        for group in range(3):
            assert (a.mask(group=group) != b.mask(group=group)).float().mean() < 1e-2
        torch.testing.assert_close(a.mass_kept, b.mass_kept, atol=1e-2, rtol=0)


def test_steps_that_measure_masks_and_biases_wait_for_nothing(monkeypatch):
    """Every site is launched without looking at the one before."""
    monkeypatch.setattr("comfyui_paro.paro_runtime.run.tail_bias.LEAST_WORK", 0)
    settings = Settings(preset="custom", density=0.3, dense_steps=1, min_tokens=0, strict=True, dense_attention="host")
    generator = torch.Generator("cuda").manual_seed(0)
    calls = [
        [torch.randn(1, LAYOUT.length, 4, 64, device="cuda", generator=generator).bfloat16().transpose(1, 2)] * 3
        for _ in SITES
    ]
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.0]
    with torch.inference_mode():
        for waits in ("default", "error"):  # what is made once is made in the first run
            policy = Policy(ModelIdentity("wan", "a", "b"), recipe_for("wan"), settings)
            session = Session(policy, sigmas=sigmas)
            for step, sigma in enumerate(sigmas[:-1]):
                attempt = session.attempt(can_redo=True)
                evaluation = session.begin(layout=LAYOUT, sigma=sigma, attempt=attempt)
                torch.cuda.set_sync_debug_mode(waits if step > 0 else "default")
                try:
                    for site, (q, k, v) in zip(SITES, calls, strict=True):
                        evaluation.attend(site, q, k, v, dense=lambda q=q: q)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                assert not evaluation.end()
            report = session.finish()
            assert report.sites_sparse == report.sites_routed == len(SITES) and not report.fallbacks
