"""The method on attention with a known answer: orders, masks, the tail's bias and its cost."""

import pkgutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from comfyui_paro.bench.paro_bench.baselines import band_mask, radial_mask, random_mask
from comfyui_paro.bench.paro_bench.generator import ARCHETYPES, EASY, HARD, TEXT, make_problem
from comfyui_paro.bench.paro_bench.sta import published, run
from comfyui_paro.kernels.attention.reference import sparse_attention_reference
from comfyui_paro.kernels.core.inputs import AttentionInputs, ScoreInputs
from comfyui_paro.kernels.core.layout import TokenLayout, geometry_of
from comfyui_paro.kernels.core.precision import PRECISIONS
from comfyui_paro.kernels.core.sampling import spread_positions
from comfyui_paro.paro_runtime.attention.patterns import build_pattern
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator, Method
from comfyui_paro.paro_runtime.calibration.mask_choice import PerHeadBudget, SharedBudget, density_for, masks_by
from comfyui_paro.paro_runtime.calibration.observe import observe
from comfyui_paro.paro_runtime.calibration.options import StatisticsOptions
from comfyui_paro.paro_runtime.calibration.order_choice import sums_under_orders
from comfyui_paro.paro_runtime.calibration.tables import Worth
from comfyui_paro.paro_runtime.calibration.tail_fit import (
    BIASES,
    NO_TAIL,
    best_bias,
    bias_at,
    measured_rows,
    observe_bias,
    observe_tail,
)
from comfyui_paro.paro_runtime.plan.options import MaskOptions
from comfyui_paro.paro_runtime.plan.orders import order_table
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.run.tail_bias import TailBiasUpdate

IDENTITY = ModelIdentity("bench", "planted", "planted")
GRID = (7, 9, 8)
LAYOUT = TokenLayout(TEXT, GRID)
SITE = Site("planted", 0)


@pytest.fixture(scope="module")
def planted():
    return make_problem(GRID, HARD)


def test_problems_repeat_and_planted_heads_are_found(planted):
    assert torch.equal(make_problem(GRID, HARD).q, planted.q) and not torch.equal(
        make_problem(GRID, HARD, 1).q, planted.q
    )
    easy = make_problem((9, 11, 10), EASY, samples=(1,))
    seen = observe(
        ScoreInputs(easy.q, easy.k), TokenLayout(TEXT, easy.grid), 64, StatisticsOptions(0.25, tiles=False, pool=None)
    )
    for head, kind in enumerate(ARCHETYPES):
        if kind.orders:
            best = max(seen.scores[head, seen.candidates.index(name)] for name in kind.orders)
            assert seen.scores[head].max() - best <= 0.02, kind.name


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("chunk", [1 << 12, 1 << 30])
def test_sums_under_all_orders_are_the_kernels(planted, monkeypatch, block_q, chunk):
    """Context on both sides, grouped heads, a batch, a key bias; in chunks of a few rows and in one."""
    from comfyui_paro.kernels.statistics.api import block_statistics, row_logsumexp

    monkeypatch.setattr("comfyui_paro.kernels.statistics.order_sums.ELEMENTS_IN_CACHE", chunk)
    layout = TokenLayout(TEXT - 5, GRID, 5)
    q, k = planted.q[:2, :4], planted.k[:2, :2]
    bias = torch.randn(2, layout.length) * (torch.rand(2, layout.length) < 0.1)
    geometry, lse = geometry_of(layout, block_q), row_logsumexp(ScoreInputs(q, k, key_bias=bias))
    names = ("FHW", "WHF", "4x4x4")
    found = sums_under_orders(ScoreInputs(q, k, key_bias=bias), geometry, names)
    weights = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * q.shape[3] ** -0.5 + bias[:, None, None]).softmax(3)
    on_grid = weights[:, :, geometry.prefix : -5, geometry.prefix : -5].mean(0)
    for name, mass in zip(names, found, strict=True):
        table = order_table(name, GRID)
        cells = on_grid[:, table.long()][:, :, table.long()]
        for i in range(geometry.q_blocks):
            rows = cells[:, i * block_q : (i + 1) * block_q].sum(1)
            expected = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 64)).unflatten(1, (-1, 64)).sum(2)
            torch.testing.assert_close(mass[:, i], expected, atol=1e-4, rtol=1e-4)
        if not bias[:, geometry.prefix : -5].any():
            kernels = block_statistics(ScoreInputs(q, k), lse, geometry, table.expand(4, -1)).mass
            torch.testing.assert_close(mass, kernels, atol=1e-4, rtol=1e-4)


def test_sums_from_some_rows_stand_for_all(planted):
    """Half of the rows: no block of any order is overlooked, and the total is that of all rows."""
    q, k, geometry = planted.q[:1, :4], planted.k[:1, :4], geometry_of(LAYOUT, 64)
    names = StatisticsOptions(0.25).candidates(GRID)
    some = sums_under_orders(ScoreInputs(q, k), geometry, names, rows=LAYOUT.grid_tokens // 2)
    for part, every in zip(some, sums_under_orders(ScoreInputs(q, k), geometry, names), strict=True):
        assert (part.sum(2) > 0).all() and not torch.equal(part, every)
        torch.testing.assert_close(part.sum((1, 2)), every.sum((1, 2)), rtol=0.03, atol=0)
        assert torch.corrcoef(torch.stack([part.flatten(), every.flatten()]))[0, 1] > 0.97


def test_masks_have_their_density_and_no_empty_row():
    mass = [torch.rand(3, 7, 9) ** 4, torch.rand(2, 7, 9) ** 4]
    for masks in (masks_by(budget, mass, 0.3) for budget in (SharedBudget, PerHeadBudget)):
        assert all(mask.any(2).all() for mask in masks)
        assert torch.cat([m.float().mean((1, 2)) for m in masks]).mean() == pytest.approx(0.3, abs=0.03)


@pytest.fixture(scope="module")
def masked(planted):
    """Orders, tables and masks of the twelve heads at density 0.25."""
    calibrator = Calibrator(IDENTITY, MaskOptions(0.25, "mass", "shared", 64))
    calibrator.observe(SITE, LAYOUT, planted.q[:-1], planted.k[:-1], planted.v[:-1])
    entry = calibrator.plan({}).sites[SITE]
    return entry, torch.stack([order_table(name, GRID) for name in entry.orders])


@pytest.mark.parametrize(("pool", "expansions"), [(64, 16), (64, 3), (64, 0), (16, 16)])
def test_the_error_of_a_bias_is_that_of_the_attention(planted, masked, pool, expansions):
    """Every row sampled, three biases, against the kernels' reference: the formula is exact."""
    entry, tables = masked
    q, k, v = planted.q[:1], planted.k[:1], planted.v[:1]
    pools = {"pool": pool, "expansions": expansions}
    errors = observe_bias(
        AttentionInputs(q, k, v, geometry_of(LAYOUT, 64), tables), entry.mask(), rows=LAYOUT.grid_tokens, **pools
    ).errors
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for at in (0, 8, 15):
        bias = torch.full((12,), BIASES[at])
        pattern = build_pattern(LAYOUT, entry.orders, entry.mask(), bias, **pools)
        out = sparse_attention_reference(q, k, v, pattern, PRECISIONS["16bit"])
        expected = (out - dense)[0, :, TEXT:].square().sum((1, 2))
        torch.testing.assert_close(errors[:, at], expected, rtol=2e-2, atol=1e-2)


def test_a_head_does_not_leave_its_order_for_one_that_is_as_good(planted):
    """Each change of order throws away what was summed: observations that disagree by a little must not undo it all."""
    options = StatisticsOptions(0.25, pool=None)
    scores = ScoreInputs(planted.q[:1], planted.k[:1])
    first = observe(scores, LAYOUT, 64, options)
    best = first.scores.amax(1)
    other = (first.choice + 1) % len(first.candidates)
    for lead, stays in ((0.005, True), (0.03, False)):
        # What came before makes the other order the better one by this share.
        gap = best - first.scores.gather(1, other[:, None])[:, 0] + lead * best
        before = torch.zeros_like(first.scores).scatter(1, other[:, None], gap[:, None])
        seen = observe(scores, LAYOUT, 64, options, previous_scores=before, previous_choice=first.choice)
        assert torch.equal(seen.choice, first.choice if stays else other)
        free = observe(scores, LAYOUT, 64, options, previous_scores=before)
        assert torch.equal(free.choice, other)


def test_the_tail_never_costs_a_head_what_dropping_does_not(planted, masked):
    """Planted heads follow content: the bias that makes their mass right hurts, the bias of least error cannot."""
    entry, tables = masked
    q, k, v = planted.q[:1], planted.k[:1], planted.v[:1]
    seen = observe_bias(
        AttentionInputs(q, k, v, geometry_of(LAYOUT, 64), tables), entry.mask(), pool=64, rows=LAYOUT.grid_tokens
    )
    errors = seen.errors
    chosen = errors.gather(1, errors.argmin(1, keepdim=True))[:, 0]
    assert (chosen <= errors[:, 0]).all()
    found = best_bias(errors)
    assert found.isfinite().all() and (found.abs() <= 20).all()
    only_drop = torch.arange(len(BIASES), dtype=torch.float32)[None]
    assert best_bias(only_drop).item() == NO_TAIL


def test_bias_follows_the_density_of_the_mask():
    curves = torch.full((2, 4, len(BIASES)), 1.0)
    curves[:, 0, 10] = curves[:, 3, 20] = 0
    low, high = bias_at(curves, torch.tensor([0.01, 0.9])).tolist()
    assert low == pytest.approx(BIASES[10], abs=0.13) and high == pytest.approx(BIASES[20], abs=0.13)


def test_sampled_errors_stand_for_all_rows(planted, masked):
    _, tables = masked
    q, k, v = planted.q[:1, :4], planted.k[:1, :4], planted.v[:1, :4]
    options = {"density": 0.25, "pool": 64}
    geometry = geometry_of(LAYOUT, 64)
    few, every = (
        observe_tail(AttentionInputs(q, k, v, geometry, tables[:4]), rows=rows, **options).error for rows in (16, 64)
    )
    assert torch.corrcoef(torch.stack([few.flatten(), every.flatten()]))[0, 1] > 0.9


def test_refresh_comes_with_every_group_and_adds_up_within_a_step(planted, masked):
    entry, _ = masked
    refresh = TailBiasUpdate()
    # A group of steps has a mask of its own: its first step measures, in every one of its evaluations.
    assert [step for step in range(3, 20) if refresh.due("site", step, step // 7, False)] == [3, 7, 14]
    assert refresh.due("site", 14, 2, False) and refresh.due("site", 14, 2, False)
    assert [step for step in range(3, 20) if refresh.due("short", step, step // 7, True)] == [3]
    refresh = TailBiasUpdate()
    assert refresh.due("site", 19, 0, False)
    pattern = build_pattern(LAYOUT, entry.orders, entry.mask(), entry.tail_bias)
    q, k, v = planted.q[:1], planted.k[:1], planted.v[:1]
    assert refresh.bias("site") is None
    refresh.measure("site", 3, ScoreInputs(q, k), v, pattern)
    once = refresh.bias("site")
    refresh.measure("site", 3, ScoreInputs(q, k), v, pattern)
    torch.testing.assert_close(refresh.bias("site"), once)


def test_the_error_of_a_run_is_that_of_its_results(planted, masked, monkeypatch):
    """Every row looked at: what is told is the error of the whole results, in all steps and in the worst site."""
    monkeypatch.setattr("comfyui_paro.paro_runtime.run.tail_bias.measured_rows", lambda tokens: tokens)
    entry, _ = masked
    pattern = build_pattern(LAYOUT, entry.orders, entry.mask(), entry.tail_bias[0])
    refresh, wrong, whole, worst = TailBiasUpdate(), 0.0, 0.0, 0.0
    for site, number in (("a", 0), ("b", 1)):
        call = [x[number : number + 1] for x in (planted.q, planted.k, planted.v)]
        seen = refresh.measure(site, 3, ScoreInputs(*call[:2]), call[2], pattern)
        out = sparse_attention_reference(*call, pattern, PRECISIONS["16bit"])
        refresh.judge(site, 3, seen, out)
        exact = torch.nn.functional.scaled_dot_product_attention(*call)[:, :, TEXT:]
        error = (out[:, :, TEXT:] - exact).square().sum()
        wrong, whole = wrong + error, whole + exact.square().sum()
        worst = max(worst, float(error / exact.square().sum()) ** 0.5)
    assert refresh.error == pytest.approx((float(wrong / whole) ** 0.5, worst), rel=1e-3)
    error, restore = refresh.error, refresh.saved()
    refresh.judge("a", 3, seen, out + 1)
    assert refresh.error > error
    restore()
    assert refresh.error == error


def test_blocks_by_mass_and_by_error_are_two_choices(planted):
    options, plans = MaskOptions(0.25, "mass", "shared", 64), {}
    for criterion in ("mass", "error"):
        calibrator = Calibrator(IDENTITY, options, method=Method(criterion=criterion))
        calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])
        plans[criterion] = calibrator.plan({})
        assert plans[criterion].density == pytest.approx(0.25, abs=0.02)
    assert plans["mass"].mass_kept > plans["error"].mass_kept


def test_without_values_the_tail_has_no_bias_until_a_run_measures_it(planted):
    calibrator = Calibrator(IDENTITY, MaskOptions(0.25, "mass", "shared", 64, 0.0, "falling"))
    calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1])
    plan = calibrator.plan({})
    assert torch.equal(plan.sites[SITE].tail_bias, torch.zeros(3, 12)) and plan.expansions == 16
    assert plan.made["criterion"] == "mass" and plan.density == pytest.approx(0.25, abs=0.02)


def test_a_full_gpu_leaves_the_masks_to_the_cpu(planted, monkeypatch):
    calibrator = Calibrator(IDENTITY, MaskOptions(0.25, "mass", "shared", 64))
    calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])
    expected, asked = calibrator.plan({}), []

    class Full(SharedBudget):
        def __init__(self, worths, densities, device):
            asked.append(device.type)
            if device.type != "cpu":
                raise torch.OutOfMemoryError
            super().__init__(worths, densities, device)

    monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.planning.SharedBudget", Full)
    calibrator._device = torch.device("cuda")
    plan = calibrator.plan({})
    assert asked == ["cuda", "cpu"] and torch.equal(plan.sites[SITE].packed, expected.sites[SITE].packed)


def test_a_gpu_that_is_full_by_then_leaves_the_rest_to_the_cpu(planted, monkeypatch):
    calibrator = Calibrator(IDENTITY, MaskOptions(0.25, "mass", "shared", 64))
    calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])
    expected, full = calibrator.plan({}), ["small", "masks"]

    def once(name, function):
        def call(*args, **more):
            if name in full:
                full.remove(name)
                raise torch.OutOfMemoryError
            return function(*args, **more)

        return call

    for name, place in (("small", "Planner._small"), ("masks", "pack_bits")):
        place = f"comfyui_paro.paro_runtime.calibration.planning.{place}"
        monkeypatch.setattr(place, once(name, pkgutil.resolve_name(place)))
    plan = calibrator.plan({})
    assert not full and torch.equal(plan.sites[SITE].packed, expected.sites[SITE].packed)


def test_thresholds_over_many_values_come_from_a_sample(monkeypatch):
    mass = [torch.rand(3, 37, 41) ** 4, torch.rand(2, 37, 41).bfloat16() ** 2]
    before = [m.clone() for m in mass]
    monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.mask_choice.THRESHOLD_VALUES", 4000)
    masks = masks_by(SharedBudget, mass, 0.3)
    assert torch.cat([m.flatten() for m in masks]).float().mean() == pytest.approx(0.3, abs=0.03)
    # One threshold: whatever is kept beyond the musts is above whatever is dropped.
    assert all(torch.equal(a, b) for a, b in zip(mass, before, strict=True))


def test_block_sums_come_from_the_sampled_rows_unless_every_row_is_asked_for(planted, monkeypatch):
    # As on grids that are neither small nor large.
    monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.order_choice.SHARED_ROWS", 0)
    q, k, v = planted.q[:1], planted.k[:1], planted.v[:1]
    sampled = observe(ScoreInputs(q, k), LAYOUT, 64, StatisticsOptions(0.25, "original"), v=v)
    exact = observe(ScoreInputs(q, k), LAYOUT, 64, StatisticsOptions(0.25, "original", by_mass=True), v=v)
    assert torch.equal(sampled.mass, sampled.tail.mass) and not torch.equal(sampled.mass, exact.mass)
    torch.testing.assert_close(sampled.mass.sum((1, 2)), exact.mass.sum((1, 2)), rtol=0.05, atol=1)
    assert torch.corrcoef(torch.stack([sampled.mass.flatten(), exact.mass.flatten()]))[0, 1] > 0.95


def test_block_sums_of_every_order_stay_on_their_device():
    """On the meta device any tensor that was made on the CPU by mistake is an error, as it would be on a GPU."""
    q, k = torch.empty(2, 1, 4, LAYOUT.length, 32, device="meta")
    sums = sums_under_orders(ScoreInputs(q, k), geometry_of(LAYOUT, 64), ("FHW", "HWF"), rows=100)
    assert [s.device.type for s in sums] == ["meta", "meta"]


def test_every_head_group_and_row_chunk_tells_the_same(planted, masked, monkeypatch):
    """Grouped heads, done one key head at a time, against all at once."""
    _, tables = masked
    q, k, v = planted.q[:1], planted.k[:1, ::2], planted.v[:1, ::2]
    tables, g = tables[::2].repeat_interleave(2, 0), geometry_of(LAYOUT, 64)
    whole = observe_tail(AttentionInputs(q, k, v, g, tables), density=0.25, pool=64)
    monkeypatch.setattr("comfyui_paro.kernels.core.sampling.GROUP_BYTES", 1)
    monkeypatch.setattr("comfyui_paro.kernels.tail_error.reference.CHUNK_ELEMENTS", 1 << 12)
    parts = observe_tail(AttentionInputs(q, k, v, g, tables), density=0.25, pool=64)
    for name in ("error", "mass", "curves", "energy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-3, atol=1e-6)


def test_the_mass_of_some_query_blocks_tells_what_a_mask_keeps(planted, monkeypatch, tmp_path):
    """Errors choose the blocks; the attention kept must not depend on MASS_BLOCKS."""
    plans = []
    for number in (5, 1 << 20):
        monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.accumulator.MASS_BLOCKS", number)
        options = MaskOptions(0.25, "mass", "shared", 64)
        calibrator = Calibrator(IDENTITY, options, partial=tmp_path / str(number))
        calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])
        resumed = Calibrator(IDENTITY, options, partial=tmp_path / str(number))
        assert resumed.observations == 1
        plans.append(resumed.plan({}).sites[SITE])
    few, every = plans
    assert torch.equal(few.packed, every.packed)
    assert not torch.equal(few.mass_kept, every.mass_kept)
    torch.testing.assert_close(few.mass_kept, every.mass_kept, atol=0.15, rtol=0)


# At 0.7 the last group of a falling density is as sparse as rows can be, and cannot become sparser.
@pytest.mark.parametrize("target, schedule", [(0.7, "constant"), (0.9, "constant"), (0.9, "falling")])
@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_a_mass_target_keeps_as_few_blocks_as_it_takes(planted, budget, target, schedule):
    calibrator = Calibrator(IDENTITY, MaskOptions(1.0, "mass", budget, 64, target, schedule))
    calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])

    def plan_with(**change):
        calibrator.options = replace(calibrator.options, **change)
        return calibrator.plan({})

    found = plan_with()
    assert target <= found.mass_kept <= target + 0.03
    assert set(found.sites[SITE].orders) != {"FHW"}  # compared at a density that tells orders apart
    assert plan_with(density=found.density - 0.02, mass_target=0.0).mass_kept < target
    # The density is the most it may be, whatever the target.
    least = plan_with(density=0.13, mass_target=target)
    assert least.density == pytest.approx(0.13, abs=0.03) and least.mass_kept < target


def test_a_mass_target_is_judged_where_the_mass_is_known(planted, monkeypatch):
    """Large tables keep the mass of some query blocks only."""
    found = []
    for blocks in (64, 5):
        monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.accumulator.MASS_BLOCKS", blocks)
        calibrator = Calibrator(IDENTITY, MaskOptions(1.0, "mass", "shared", 64, 0.9, "falling"))
        calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])
        found.append(calibrator.plan({}))
        assert found[-1].mass_kept == pytest.approx(0.9, abs=0.04)
    assert found[0].density == pytest.approx(found[1].density, abs=0.06)


def test_the_density_of_a_target_can_be_judged_by_some_rows(monkeypatch):
    masses = [Worth(torch.rand(2, 64, 64) ** 6), Worth(torch.rand(3, 64, 64) ** 2)]

    every = density_for(masses, masses, 0.8, 1.0, partial(masks_by, SharedBudget))
    monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.mask_choice.TARGET_VALUES", 5 * 64 * 16)
    assert density_for(masses, masses, 0.8, 1.0, partial(masks_by, SharedBudget)) == pytest.approx(every, abs=0.03)


def test_fixed_masks_have_the_density_and_the_diagonal():
    geometry = geometry_of(TokenLayout(0, (8, 12, 12)), 64)
    for mask in (radial_mask(geometry, 0.2), band_mask(geometry, 0.2), random_mask(geometry, 0.2, 0)):
        assert mask.float().mean() == pytest.approx(0.2, abs=0.02) and mask.diagonal().all()


def test_published_windows_want_our_orders():
    """Sliding-tile windows of HunyuanVideo, averaged over all heads and steps 15 to 49; known figures to 3 places."""
    assert len(published()["heads"]) == 1440
    found = run(64)
    assert found["original"] == pytest.approx(0.356, abs=6e-4) and found["ideal"] == pytest.approx(0.166, abs=6e-4)
    assert found["best_per_head"] == pytest.approx(0.195, abs=6e-4) and found["selected"] <= 0.2
    assert found["windows"]["temporal"]["WHF"] == pytest.approx(0.168, abs=6e-4)
    assert found["one_order_for_all"]["FWH"] == pytest.approx(0.335, abs=6e-4)


@pytest.mark.parametrize("tokens, count", [(50, 50), (1000, 64), (9000, 90), (75600, 192)])
def test_rows_to_measure_are_spread_evenly_and_never_few(tokens, count):
    found = spread_positions(tokens, measured_rows(tokens), torch.device("cpu"))
    assert found.numel() == count and found[0] >= 0 and found[-1] < tokens
    assert (found.diff() - tokens / count).abs().max() <= 1
