"""The whole path on a GPU: the tiny trained model through a session, Triton kernels against the PyTorch reference."""

import pytest
import torch
from comfyui_paro.bench.metrics import psnr
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session
from comfyui_paro.tests.tiny_wan.data import context_for, decode
from comfyui_paro.tests.tiny_wan.model import load_tiny_wan
from comfyui_paro.tests.tiny_wan.sampler import sample, sigmas

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels on hardware are not tested"),
]


def clip(model, settings, grid, batch=1):
    """Decoded clip and the session's report (None for dense)."""
    context = context_for("cross", "left-up", "checker").expand(batch, -1, -1)
    size = (grid[0], 2 * grid[1], 2 * grid[2])
    if settings is None:
        return decode(sample(model, context, size, seed=3).cpu()), None
    policy = Policy(ModelIdentity("wan", "tiny", "tiny"), recipe_for("wan"), settings)
    session = Session(policy, sigmas=sigmas().tolist())
    evaluation = None

    def on_step(step, sigma):
        nonlocal evaluation
        evaluation = session.begin(layout=TokenLayout(0, grid), sigma=sigma)

    def attention(q, k, v, *, layer):
        def dense():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return evaluation.attend(Site("double", layer), q, k, v, dense=dense)

    latent = sample(model, context, size, seed=3, attention=attention, on_step=on_step)
    return decode(latent.cpu()), session.finish()


@pytest.mark.parametrize("grid", [(8, 12, 12), (9, 13, 11)])
@pytest.mark.parametrize("precision", ["16bit", "int8", "int8_pv8", "fp8", "int4"])
def test_triton_and_the_reference_give_the_same_clip(grid, precision):
    model = load_tiny_wan(device="cuda")
    dense, _ = clip(model, None, grid)
    settings = {
        backend: Settings(
            preset="custom",
            density=0.3,
            precision=precision,
            dense_steps=3,
            min_tokens=0,
            backend=backend,
            strict=True,
        )
        for backend in ("triton", "reference")
    }
    triton, report = clip(model, settings["triton"], grid)
    reference, _ = clip(model, settings["reference"], grid)
    assert report.backend == "triton" and report.sites_sparse == 4 and report.fallbacks == []
    fidelity = psnr(triton, dense)
    print(f"{grid} {precision}: triton {fidelity:.2f} dB, reference {psnr(reference, dense):.2f} dB against dense")
    # Two ways to round the same numbers: the clips agree far better than either agrees with dense.
    assert psnr(triton, reference) > fidelity
    assert fidelity > psnr(reference, dense) - 1.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_run_sparse(dtype):
    model = load_tiny_wan(device="cuda", dtype=dtype)
    dense, _ = clip(model, None, (8, 12, 12), batch=2)
    settings = Settings(preset="custom", density=0.3, dense_steps=3, min_tokens=0, strict=True)
    paro, report = clip(model, settings, (8, 12, 12), batch=2)
    assert report.backend == "triton" and report.sites_sparse == 4
    assert psnr(paro, dense) > 24


def test_density_1_at_16_bit_is_dense_attention():
    model = load_tiny_wan(device="cuda", dtype=torch.bfloat16)
    dense, _ = clip(model, None, (8, 12, 12))
    settings = Settings(preset="custom", density=1.0, precision="16bit", dense_steps=0, min_tokens=0, strict=True)
    paro, _ = clip(model, settings, (8, 12, 12))
    assert psnr(paro, dense) > 40
