"""What is done on large grids instead of looking at everything: sampled rows and thresholds, tables in 8 bits."""

import math
from dataclasses import replace

import pytest
import torch
from comfyui_paro.bench.paro_bench.generator import HARD, TEXT, make_problem
from comfyui_paro.kernels.core.gather import block_positions, block_sizes
from comfyui_paro.kernels.core.inputs import ScoreInputs
from comfyui_paro.kernels.core.layout import Geometry, TokenLayout, geometry_of
from comfyui_paro.kernels.core.support import interpreted
from comfyui_paro.kernels.statistics.api import block_statistics, query_sums, row_logsumexp
from comfyui_paro.paro_runtime.calibration import observe as statistics_module
from comfyui_paro.paro_runtime.calibration.accumulator import stored
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator, Method
from comfyui_paro.paro_runtime.calibration.mask_choice import (
    HEAD_FLOOR,
    PerHeadBudget,
    SharedBudget,
    mass_kept,
    sample_stride,
)
from comfyui_paro.paro_runtime.calibration.options import StatisticsOptions
from comfyui_paro.paro_runtime.calibration.order_choice import (
    estimated_mass_kept,
    mass_kept_scores,
    order_sample,
    sampled_sums,
)
from comfyui_paro.paro_runtime.calibration.tables import Worth
from comfyui_paro.paro_runtime.plan.options import MaskOptions
from comfyui_paro.paro_runtime.plan.orders import order_table
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site

IDENTITY = ModelIdentity("wan", "a", "b")
SITE = Site("block", 0)
GRID = (7, 12, 13)
LAYOUT = TokenLayout(TEXT, GRID)


@pytest.fixture(scope="module")
def planted():
    return make_problem(GRID, HARD, samples=(1, 2))


def test_worths_are_over_their_unit():
    half, unit = (torch.rand(3, 8, 9) + 0.1).bfloat16(), torch.tensor([1, 2, 4])
    assert torch.equal(Worth(half, unit)[:, ::2].on("cpu"), half[:, ::2].float() / unit[:, None, None])


def test_two_observations_of_tables_in_16_bits_add_up(planted, monkeypatch):
    """Conditionings that the host runs apart; a head that changes its order starts anew."""
    monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.accumulator.FULL_PRECISION_ELEMENTS", 0)
    options = StatisticsOptions(0.25)
    seen = [
        statistics_module.observe(
            ScoreInputs(planted.q[i : i + 1], planted.k[i : i + 1]), LAYOUT, 64, options, v=planted.v[:1]
        )
        for i in range(2)
    ]
    seen[1] = replace(seen[1], choice=seen[0].choice.clone())
    seen[1].choice[4] = (seen[0].choice[4] + 1) % 6
    sums, more = (stored(each, True, compact=True) for each in seen)
    assert sums.error.dtype == torch.bfloat16
    sums.add(more)
    assert sums.weight.tolist() == [2] * 4 + [1] + [2] * 7 and sums.error.dtype == torch.bfloat16
    expected = seen[0].tail.error + seen[1].tail.error
    expected[4] = seen[1].tail.error[4]
    largest = expected.flatten(1).amax(1)[:, None, None]
    assert ((sums.error.float() - expected).abs() <= 0.1 * expected + 1e-8 * largest).all()


def literal_masks(masses, density):
    """One threshold over all values, after the best of every row and the best of every head are set aside."""
    values, musts = [], []
    for mass in masses:
        must = torch.zeros(mass.shape, dtype=torch.bool)
        must.scatter_(2, mass.float().argmax(2, keepdim=True), True)
        count = int(density * HEAD_FLOOR * mass[0].numel())
        for head in range(mass.shape[0]):
            must[head].view(-1)[mass[head].float().flatten().topk(count).indices] = True
        musts.append(must)
        values.append(mass.float().masked_fill(must, math.inf).flatten())
    values = torch.cat(values)
    count = round(density * values.numel())
    if count <= values.isinf().sum():
        return musts
    threshold = values.sort(descending=True).values[count - 1]
    return [(mass.float() >= threshold) | must for mass, must in zip(masses, musts, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_small_tables_are_exact(dtype):
    masses = [(torch.rand(3, 21, 23) ** 6).to(dtype), (torch.rand(2, 30, 31) ** 2).to(dtype)]
    densities = (0.41, 0.29, 0.2, 1.0, 0.02)
    budget = SharedBudget([Worth(mass) for mass in masses], densities)
    for site, mass in enumerate(masses):
        for density, mask in zip(densities, budget.masks(site), strict=True):
            expected = literal_masks(masses, density)[site] if density < 1 else torch.ones_like(mass, dtype=torch.bool)
            assert torch.equal(mask, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_by_a_sample_are_nearly_the_exact_ones(dtype, monkeypatch):
    masses = [torch.exp(spread * torch.randn(4, 96, 128)) for spread in (1, 2, 3)]
    masses[1][2] *= 1e-4  # a head that keeps its floor and no more
    densities = (0.4, 0.2, 0.1)
    exact = SharedBudget([Worth(mass) for mass in masses], densities)
    monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.mask_choice.THRESHOLD_VALUES", 60_000)
    sampled = SharedBudget([Worth(mass.to(dtype)) for mass in masses], densities)
    kept, wanted = [], []
    for site, mass in enumerate(masses):
        for found, expected in zip(sampled.masks(site), exact.masks(site), strict=True):
            assert found.gather(2, found.float().argmax(2, keepdim=True)).all() and found.any(2).all()
            assert (found.float().mean((1, 2)) - expected.float().mean((1, 2))).abs().max() < 0.03
            kept.append(mass_kept(mass, found))
            wanted.append(mass_kept(mass, expected))
            if site == 1:
                assert found[2].float().mean() > 0.7 * HEAD_FLOOR * found.float().mean()
    torch.testing.assert_close(torch.cat(kept), torch.cat(wanted), rtol=0.05, atol=0.03)
    for number, density in enumerate(densities):
        mean = sum(sampled.masks(site)[number].float().mean() for site in range(3)) / 3
        assert mean == pytest.approx(density, abs=0.01)


def test_blocks_that_are_worth_nothing_are_not_kept_to_fill_a_density(monkeypatch):
    monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.mask_choice.THRESHOLD_VALUES", 2_000)
    mass = torch.zeros(2, 64, 64)
    mass[:, :, 5] = 1
    mask = SharedBudget([Worth(mass)], [0.3]).masks(0)[0]
    assert torch.equal(mask, mass > 0)


def test_the_same_density_in_every_head():
    mass = torch.rand(3, 40, 41) ** 4
    for mask in PerHeadBudget([Worth(mass)], [0.3]).masks(0)[0]:
        assert mask.float().mean() == pytest.approx(0.3, abs=1e-3)


def test_a_stride_comes_to_every_column():
    for columns in (64, 96, 1182, 1):
        for least in (0.2, 1.0, 2.4, 63.5, 64):
            stride = sample_stride(least, columns)
            assert least <= stride <= least + 30 and (stride == 1 or math.gcd(stride, columns) == 1)


def test_orders_are_compared_without_ranking_every_block(monkeypatch):
    # What 400 of 1,280 values tell is off by up to 3 % in one draw of 300: always the same draw.
    sums = (
        torch.rand(5, 3, 20, 64, generator=torch.Generator().manual_seed(0))
        ** torch.tensor([1.0, 3.0, 9.0, 20.0, 40.0])[:, None, None, None]
    )
    exact = mass_kept_scores(list(sums), 0.3).T
    for values, off in ((1 << 20, 1e-5), (400, 1e-2)):
        monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.mask_choice.RANKED_VALUES", values)
        torch.testing.assert_close(estimated_mass_kept(sums, 0.3), exact, rtol=off, atol=0)


@pytest.mark.parametrize("block_q", [64, 128])
def test_sampled_sums_are_the_attention_of_those_rows(planted, block_q):
    q, k = planted.q[:, :4], planted.k[:, :2]
    g, names = geometry_of(LAYOUT, block_q), ("FHW", "HWF", "4x4x4")
    found = sampled_sums(ScoreInputs(q, k), g, names, 5, 8)
    weights = (q @ k.repeat_interleave(2, 1).mT * q.shape[3] ** -0.5).softmax(3).mean(0)
    sample = order_sample(g.q_blocks, 5, q.device)
    assert sample[-1] == g.q_blocks - 1  # a short one
    rows, share = block_positions(g, sample, 8)[0], block_sizes(g, sample)[:, None] / 8
    for name, sums in zip(names, found, strict=True):
        tokens = order_table(name, GRID).long() + g.prefix
        of_keys = weights[:, tokens[rows]].sum(2)[..., tokens].split(64, 2)
        expected = torch.stack([part.sum(2) for part in of_keys], 2) * share
        torch.testing.assert_close(sums, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dim, dtype, per_block, own", [(64, torch.float16, 16, False), (72, torch.float32, 4, True)])
def test_the_kernel_of_query_sums(dim, dtype, per_block, own, wide, monkeypatch):
    """Several orders for all heads, or one for each; grouped heads, batch, views as the host gives them; both tiles."""
    from comfyui_paro.kernels.statistics import triton_query_sums

    if wide:
        tile = triton_query_sums.logs_tile((9, 0), 64, wide=False)
        assert tile.keys == 128
        monkeypatch.setattr(triton_query_sums, "logs_tile", lambda *_: tile)
    g = Geometry(3, (2, 7, 23), 1)
    k = torch.randn(2, g.length, 2, dim).to(dtype).transpose(1, 2)
    orders = 1 if own else 3
    queries = torch.randn(2, 4, orders * 5 * per_block, dim).to(dtype)
    bias = torch.randn(2, g.length) if own else None
    if own:
        tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(4)]).int()[None]
    else:
        tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(3)]).int()[:, None].expand(-1, 4, -1)
    found, expected = (
        query_sums(ScoreInputs(queries, k, key_bias=bias), g, tables, per_block, backend)
        for backend in ("triton", "reference")
    )
    assert found.shape == (orders, 4, 5, g.k_blocks)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("criterion", ["mass", "error"])
def test_a_plan_made_as_on_large_grids_keeps_nearly_as_much(planted, criterion, monkeypatch):
    """With the reference: mean queries or a quarter of the rows, orders from few rows, tables in 16 bits, thresholds by
    a sample. Judged by the exact sums of every row."""
    q, k, v = planted.q[:1], planted.k[:1], planted.v[:1]
    kept = {}
    for large in (False, True):
        if large:
            for name in ("options.SHARED_TOKENS", "order_choice.SHARED_ROWS", "accumulator.FULL_PRECISION_ELEMENTS"):
                monkeypatch.setattr(f"comfyui_paro.paro_runtime.calibration.{name}", 0)
            monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.mask_choice.THRESHOLD_VALUES", 2000)
        options = MaskOptions(0.3, "mass", "shared", 64, 0.0, "falling")
        calibrator = Calibrator(IDENTITY, options, method=Method(criterion=criterion))
        calibrator.observe(SITE, LAYOUT, q, k, v)
        table = calibrator._sums[SITE].mass if criterion == "mass" else calibrator._sums[SITE].error
        assert (table.dtype == torch.bfloat16) == large
        plan = calibrator.plan({})
        entry = plan.sites[SITE]
        assert plan.density == pytest.approx(0.3, abs=0.02) and plan.made["criterion"] == criterion
        tables = torch.stack([order_table(name, GRID) for name in entry.orders])
        scores = ScoreInputs(q, k)
        mass = block_statistics(scores, row_logsumexp(scores), geometry_of(LAYOUT, 64), tables).mass
        kept[large] = torch.stack([mass_kept(mass, entry.mask(group=group)).mean() for group in range(3)])
    assert (kept[True] > kept[False] - (0.045 if criterion == "mass" else 0.03)).all(), kept


def test_no_errors_of_blocks_are_measured_where_masses_decide(planted, monkeypatch):
    for name in ("options.SHARED_TOKENS", "order_choice.SHARED_ROWS"):
        monkeypatch.setattr(f"comfyui_paro.paro_runtime.calibration.{name}", 0)
    q, k, v = planted.q[:1], planted.k[:1], planted.v[:1]
    seen = statistics_module.observe(ScoreInputs(q, k), LAYOUT, 64, StatisticsOptions(0.3, by_mass=True), v=v)
    assert seen.tail.error is None and seen.tail.energy is None and seen.tail.curves.isfinite().all()
    assert seen.mass.sum((1, 2)).max() <= LAYOUT.grid_tokens * 1.01
    both = statistics_module.observe(ScoreInputs(q, k), LAYOUT, 64, StatisticsOptions(0.3), v=v)
    assert torch.equal(both.mass, both.tail.mass) and both.tail.energy is not None
    # Without values, or a tail, nothing but masses is there to decide.
    for more in ({}, {"v": v}):
        none = statistics_module.observe(ScoreInputs(q, k), LAYOUT, 64, StatisticsOptions(0.3, pool=None), **more)
        assert none.tail is None and torch.equal(none.mass, seen.mass)


def test_masks_that_serve_from_the_first_step_on_have_every_block(planted, monkeypatch):
    """By mass although errors could be known: the mass of some query blocks would not do."""
    for name in ("options.SHARED_TOKENS", "order_choice.SHARED_ROWS"):
        monkeypatch.setattr(f"comfyui_paro.paro_runtime.calibration.{name}", 0)
    monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.accumulator.MASS_BLOCKS", 5)
    calibrator = Calibrator(IDENTITY, MaskOptions(0.3, "mass", "shared", 64, 0.0, "steep"))
    calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])
    plan = calibrator.plan({})
    blocks = geometry_of(LAYOUT, 64).q_blocks
    assert plan.made["criterion"] == "mass" and plan.sites[SITE].shape == (12, blocks, blocks)
