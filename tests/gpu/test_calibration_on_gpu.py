"""The kernels of calibration on hardware against the PyTorch reference, and a plan that is worked out there."""

import pytest
import torch
from comfyui_paro.kernels.core.inputs import AttentionInputs, ScoreInputs
from comfyui_paro.kernels.core.layout import Geometry, TokenLayout
from comfyui_paro.kernels.core.sampling import sampled_rows
from comfyui_paro.kernels.statistics.api import block_statistics, row_logsumexp
from comfyui_paro.kernels.statistics.mean_queries import mean_query_masses
from comfyui_paro.kernels.tail_error.api import block_costs, row_moments
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator
from comfyui_paro.paro_runtime.calibration.mask_choice import masks_of_counts
from comfyui_paro.paro_runtime.calibration.options import StatisticsOptions
from comfyui_paro.paro_runtime.calibration.order_choice import sums_under_orders
from comfyui_paro.paro_runtime.calibration.tail_fit import measured_rows, observe_bias
from comfyui_paro.paro_runtime.plan.options import MaskOptions
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels on hardware are not tested"),
]
triton_moments = pytest.importorskip("comfyui_paro.kernels.tail_error.triton_row_errors")
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
    inputs = AttentionInputs(q, k, v, g, tables, key_bias=bias)
    levels = torch.randint(0, 3, (4, g.q_blocks, g.k_blocks), dtype=torch.uint8, device="cuda")
    costs, moments, sums = [], [], []
    lse = row_logsumexp(ScoreInputs(q, k, key_bias=bias), "reference")
    for backend in ("triton", "reference"):
        costs.append(block_costs(inputs, positions, pool=pool, backend=backend))
        moments.append(row_moments(inputs, positions[0], levels, 2, pool=pool, backend=backend))
        sums.append(block_statistics(ScoreInputs(q, k), lse, g, tables, backend=backend))
    assert worst(*costs, COSTS) < 1.5e-2
    assert worst(*moments, COSTS[:5]) < 1.5e-2
    assert worst(*sums, ("mass",)) < 1e-3
    torch.testing.assert_close(row_logsumexp(ScoreInputs(q, k, key_bias=bias), "triton"), lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype, block_q", [(torch.bfloat16, 128), (torch.float16, 64)])
def test_masses_of_mean_queries(dtype, block_q):
    g = Geometry(3, GRID, 2, block_q)
    q, k = (torch.randn(2, n, g.length, 128, device="cuda").to(dtype) for n in (4, 2))
    tables = torch.stack([torch.randperm(g.grid_tokens, device="cuda") for _ in range(2)]).int()
    tables, bias = tables.repeat_interleave(2, 0), torch.randn(2, g.length, device="cuda")
    bias[:, g.prefix : g.prefix + g.grid_tokens] = 0
    found, expected = (
        mean_query_masses(ScoreInputs(q, k, key_bias=bias), g, tables, backend=b) for b in ("triton", "reference")
    )
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 2e-3
    counts = torch.tensor([[15, 30, 45, 60], [12, 13, 25, 40]], device="cuda")
    there, here = masks_of_counts(expected, counts), masks_of_counts(expected.cpu(), counts.cpu())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))
    assert there[0].sum((1, 2)).tolist() == counts[0].tolist()


def test_values_with_a_large_common_part():
    """Blocks then differ little from the output: in bf16 alone it would be 2 % off."""
    g = Geometry(3, GRID, 2)
    q, k, v = torch.randn(3, 1, 4, g.length, 128, device="cuda").bfloat16()
    tables = torch.stack([torch.randperm(g.grid_tokens, device="cuda") for _ in range(4)]).int()
    call = (AttentionInputs(q, k, v + 10, g, tables), sampled_rows(g, q.device))
    found, expected = (block_costs(*call, pool=64, backend=backend) for backend in ("triton", "reference"))
    assert worst(found, expected, COSTS) < 1.5e-2


@pytest.mark.parametrize("tile", [(128, 8, 3), (64, 8, 2)])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_moments_of_many_rows(tile, tokens_first):
    """Both tiles, several parts of the keys and groups of heads, the host's views; more rows than a tile has."""
    g = Geometry(70, (9, 24, 25), 5, 128)
    shape = (2, g.length, 6, 128) if tokens_first else (2, 6, g.length, 128)
    q, k, v = (torch.randn(shape, device="cuda").bfloat16() for _ in range(3))
    if tokens_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = k[:, :3], v[:, :3]
    tables = torch.stack([torch.randperm(g.grid_tokens, device="cuda") for _ in range(6)]).int()
    levels = torch.randint(0, 2, (6, g.q_blocks, g.k_blocks), dtype=torch.uint8, device="cuda")
    positions = torch.randperm(g.grid_tokens, device="cuda")[:300].sort().values
    call = (AttentionInputs(q, k, v, g, tables), positions, levels, 1)
    pools = {"pool": 64, "expansions": 5}
    expected = row_moments(*call, **pools, backend="reference")
    for sum_bytes, pool_bytes in ((1, 1), (triton_moments.SUM_BYTES, triton_moments.POOL_BYTES)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_moments, "SUM_BYTES", sum_bytes)
            patch.setattr(triton_moments, "POOL_BYTES", pool_bytes)
            found = triton_moments.launch_row_moments(*call, **pools, tile=triton_moments.MomentsTile(*tile))
        assert worst(found, expected, COSTS[:5]) < 1.5e-2


@pytest.mark.parametrize("grid, heads", [((21, 30, 52), 12), ((21, 45, 80), 10)])
def test_measuring_the_bias_takes_little_memory(grid, heads):
    """Beside its inputs: what is promised for a site of 75,600 tokens and 40 heads holds for less, too."""
    g = Geometry(0, grid, 0, 128)
    q, k, v = (torch.randn(1, g.length, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
               for _ in range(3))  # fmt: skip
    tables = torch.arange(g.grid_tokens, device="cuda", dtype=torch.int32).expand(heads, -1).contiguous()
    mask = torch.rand(heads, g.q_blocks, g.k_blocks, device="cuda") < 0.3
    observe_bias(AttentionInputs(q, k, v, g, tables), mask, pool=64, rows=measured_rows(g.grid_tokens))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    observe_bias(AttentionInputs(q, k, v, g, tables), mask, pool=64, rows=measured_rows(g.grid_tokens))
    assert torch.cuda.max_memory_allocated() - before < 128 << 20


@pytest.mark.parametrize("grid, dtype", [(GRID, torch.bfloat16), ((16, 16, 17), torch.float16)])
def test_sums_under_all_orders_are_the_cpus(grid, dtype):
    """Every row, and 4,096 of 4,352."""
    g = Geometry(3, grid, 2)
    q, k = torch.randn(2, 1, 2, g.length, 64, device="cuda").to(dtype)
    bias = torch.randn(1, g.length, device="cuda")
    names = StatisticsOptions(0.2).candidates(grid)
    found = sums_under_orders(ScoreInputs(q, k, key_bias=bias), g, names)
    expected = sums_under_orders(ScoreInputs(q.cpu(), k.cpu(), key_bias=bias.cpu()), g, names)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-3, rtol=1e-3)


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
