"""The kernels of calibration on hardware against the PyTorch reference, and a plan that is worked out there."""

import pytest
import torch
from comfyui_paro.kernels.api import block_costs, block_statistics, row_logsumexp, row_moments
from comfyui_paro.kernels.problem import Geometry
from comfyui_paro.paro_runtime.calibration import Calibrator
from comfyui_paro.paro_runtime.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.recipes import MaskOptions
from comfyui_paro.paro_runtime.tail import sampled_rows
from comfyui_paro.paro_runtime.tokens import TokenLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels on hardware are not tested"),
]
GRID = (5, 13, 11)
COSTS = ("moved", "cross", "pooled_moved", "mass", "pooled", "energy")


def worst(found, expected, names) -> float:
    """Largest deviation relative to each table's largest value."""
    return max(
        ((getattr(found, name) - getattr(expected, name)).abs().max() / getattr(expected, name).abs().max()).item()
        for name in names
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim, pool, block_q, biased", [(128, 64, 128, False), (64, 16, 64, True), (72, 64, 128, True)])
def test_kernels_of_calibration(dtype, dim, pool, block_q, biased):
    g = Geometry(3, GRID, 2, block_q)
    q, k, v = (torch.randn(2, n, g.length, dim, device="cuda").to(dtype) for n in (4, 2, 2))
    tables = torch.stack([torch.randperm(g.grid_tokens, device="cuda") for _ in range(4)]).int()
    bias = torch.randn(2, g.length, device="cuda") if biased else None
    positions = sampled_rows(g, q.device)
    rest = {"pool": pool, "key_bias": bias}
    levels = torch.randint(0, 3, (4, g.q_blocks, g.k_blocks), dtype=torch.uint8, device="cuda")
    costs, moments, sums = [], [], []
    lse = row_logsumexp(q, k, key_bias=bias, backend="reference")
    for backend in ("triton", "reference"):
        costs.append(block_costs(q, k, v, g, tables, positions, backend=backend, **rest))
        moments.append(row_moments(q, k, v, g, tables, positions[0], levels, 2, backend=backend, **rest))
        sums.append(block_statistics(q, k, lse, g, tables, backend=backend))
    assert worst(*costs, COSTS) < 1.5e-2
    assert worst(*moments, COSTS[:5]) < 1.5e-2
    assert worst(*sums, ("mass",)) < 1e-3
    torch.testing.assert_close(row_logsumexp(q, k, key_bias=bias, backend="triton"), lse, atol=1e-3, rtol=1e-3)


def test_values_with_a_large_common_part():
    """Blocks then differ little from the output: in bf16 alone it would be 2 % off."""
    g = Geometry(3, GRID, 2)
    q, k, v = torch.randn(3, 1, 4, g.length, 128, device="cuda").bfloat16()
    tables = torch.stack([torch.randperm(g.grid_tokens, device="cuda") for _ in range(4)]).int()
    call = (q, k, v + 10, g, tables, sampled_rows(g, q.device))
    found, expected = (block_costs(*call, pool=64, backend=backend) for backend in ("triton", "reference"))
    assert worst(found, expected, COSTS) < 1.5e-2


def test_a_plan_made_on_the_gpu_is_the_cpus():
    """Masks that the GPU works out from the same sums differ at ties only."""
    layout = TokenLayout(0, GRID)
    calibrator = Calibrator(ModelIdentity("wan", "a", "b"), MaskOptions(0.3, "mass", "shared", 64))
    sites = [Site("double", 0), Site("double", 1)]
    for site in sites:
        q, k, v = torch.randn(3, 1, 4, layout.length, 64, device="cuda", dtype=torch.bfloat16)
        calibrator.observe(site, layout, q, k, v)
    there = calibrator.plan({})
    calibrator._device = torch.device("cpu")
    here = calibrator.plan({})
    for site in sites:
        assert torch.equal(there.sites[site].mask(), here.sites[site].mask())
        torch.testing.assert_close(there.sites[site].mass_kept, here.sites[site].mass_kept)
