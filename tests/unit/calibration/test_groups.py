"""Groups of sparse steps: masks that grow sparser, what the plan says of them, a run that goes from one to the next."""

import pytest
import torch
from comfyui_paro.bench.paro_bench.generator import HARD, TEXT, make_problem
from comfyui_paro.kernels.core.inputs import ScoreInputs
from comfyui_paro.kernels.core.layout import TokenLayout, geometry_of
from comfyui_paro.kernels.statistics.api import block_statistics, row_logsumexp
from comfyui_paro.paro_runtime.attention.patterns import PatternCache
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator, Method
from comfyui_paro.paro_runtime.calibration.mask_choice import SharedBudget, masks_by
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.file import load_plan
from comfyui_paro.paro_runtime.plan.options import FALL, STEEP_FALL, MaskOptions, falling_densities
from comfyui_paro.paro_runtime.plan.orders import order_table
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.report.verdict import exact
from comfyui_paro.paro_runtime.run import evaluation as evaluation_module
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session
from comfyui_paro.paro_runtime.run.tail_bias import TailBiasUpdate
from torch.nn.functional import scaled_dot_product_attention as sdpa

IDENTITY = ModelIdentity("wan", "a" * 16, "b" * 16)
GRID = (7, 9, 12)
LAYOUT = TokenLayout(TEXT, GRID)
SITE, SITES = Site("double", 0), [Site("double", 0), Site("double", 1)]
SIGMAS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.4, 0.2, 0.1, 0.0]
DENSE = 2  # of eight: two steps in each group


@pytest.fixture(scope="module")
def planted():
    return make_problem(GRID, HARD)


@pytest.mark.parametrize("budget", ["shared", "per_head"])
@pytest.mark.parametrize("density", [0.25, 0.8])
def test_masks_of_later_groups_lie_within_those_of_earlier_ones(planted, budget, density):
    calibrator = Calibrator(IDENTITY, MaskOptions(density, "mass", budget, 64, 0.0, "falling"))
    calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])
    plan = calibrator.plan({})
    entry = plan.sites[SITE]
    assert plan.groups == entry.groups == 3 and plan.density == pytest.approx(density, abs=0.02)
    assert plan.densities == pytest.approx(list(falling_densities(density)), abs=0.02)
    masks = [entry.mask(group=group) for group in range(3)]
    assert not (masks[1] & ~masks[0]).any() and not (masks[2] & ~masks[1]).any()
    kept = entry.mass_kept.mean(1)
    assert kept[0] > kept[1] > kept[2] and plan.mass_kept == pytest.approx(kept.mean().item())
    # Each group's bias suits its own density, and each group is what a plan of that density alone would be.
    for group, its in enumerate(falling_densities(density)):
        calibrator.options = MaskOptions(its, "mass", budget, 64)
        alone = calibrator.plan({}).sites[SITE]
        assert torch.equal(alone.packed[0], entry.packed[group])
        assert torch.equal(alone.tail_bias[0], entry.tail_bias[group])


def test_runs_without_dense_steps_fall_more_steeply_and_keep_blocks_by_mass(planted):
    plans = {}
    for schedule, criterion in (("falling", "auto"), ("steep", "auto"), ("steep", "error")):
        options = MaskOptions(0.25, "mass", "shared", 64, 0.0, schedule)
        calibrator = Calibrator(IDENTITY, options, method=Method(criterion=criterion))
        calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])
        plans[schedule, criterion] = plan = calibrator.plan({})
        by_mass = (schedule, criterion) == ("steep", "auto")
        assert plan.made["criterion"] == ("mass" if by_mass else "error")
        fall = STEEP_FALL if schedule == "steep" else FALL
        assert plan.densities == pytest.approx(list(falling_densities(0.25, fall)), abs=0.02)
        assert plan.density == pytest.approx(0.25, abs=0.02)
    kept = [plans["steep", criterion].mass_kept for criterion in ("auto", "error")]
    assert kept[0] > kept[1]


def test_a_constant_density_has_one_group_of_plain_masks(planted):
    calibrator = Calibrator(IDENTITY, MaskOptions(0.25, "mass", "shared", None, 0.0, "constant"))
    calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1])
    plan = calibrator.plan({})
    entry = plan.sites[SITE]
    tables = torch.stack([order_table(name, LAYOUT.grid) for name in entry.orders])
    q, k = planted.q[:1], planted.k[:1]
    mass = block_statistics(ScoreInputs(q, k), row_logsumexp(ScoreInputs(q, k)), geometry_of(LAYOUT, 64), tables).mass
    assert plan.groups == 1 and torch.equal(entry.mask(), masks_by(SharedBudget, [mass], 0.25)[0])


def begin(session, step, planted, layout=LAYOUT):
    """One evaluation of a step: both sites attend; returns the results."""
    evaluation = session.begin(layout=layout, sigma=SIGMAS[step])
    results = []
    for number, site in enumerate(SITES):
        q, k, v = (x[number : number + 1] for x in (planted.q, planted.k, planted.v))
        results.append(evaluation.attend(site, q, k, v, dense=lambda t=(q, k, v): sdpa(*t)))
    evaluation.end()
    return results


def session_with(store=None, plan=None, **settings):
    chosen = Settings(preset="custom", density=0.3, dense_steps=DENSE, strict=True, precision="16bit", **settings)
    return Session(Policy(IDENTITY, recipe_for("wan"), chosen, plan, store, remember=True), sigmas=SIGMAS)


@pytest.fixture
def seen(monkeypatch):
    """The patterns that the kernel is given, in the order of the calls."""
    calls, run_kernel = [], evaluation_module.run_kernel

    def watch(q, k, v, pattern, *arguments, **options):
        calls.append(pattern)
        return run_kernel(q, k, v, pattern, *arguments, **options)

    monkeypatch.setattr(evaluation_module, "run_kernel", watch)
    return calls


def densities_of(calls) -> list[float]:
    """Mean over the sites, a value per step."""
    each = [pattern.density for pattern in calls]
    return [sum(each[i : i + len(SITES)]) / len(SITES) for i in range(0, len(each), len(SITES))]


def test_a_run_goes_through_three_densities_whose_mean_is_the_one_asked_for(planted, seen, tmp_path):
    store = PlanStore([], tmp_path)
    session = session_with(store)
    for step in range(8):
        begin(session, step, planted)
        assert len(session.patterns) == (len(SITES) if step >= DENSE else 0)  # of one group at a time
    found = densities_of(seen)
    first, middle, last = falling_densities(0.3)
    assert found == pytest.approx([first, first, middle, middle, last, last], abs=0.02)
    assert sum(found) / 6 == pytest.approx(0.3, abs=0.01)
    report = session.finish()
    each = ", ".join(f"{exact(density)} in 2 steps" for density in report.densities)
    assert f"{exact(report.density)} of the blocks kept on average: {each}" in report.text()
    assert report.density == pytest.approx(0.3, abs=0.01) and report.densities == report.plan.densities
    assert load_plan(next(tmp_path.glob("*.safetensors"))).groups == 3
    # A second run finds the plan and goes the same way.
    once = [pattern.kept_words for pattern in seen]
    seen.clear()
    again = session_with(store)
    for step in range(8):
        begin(again, step, planted)
    assert again.finish().plan_source == "plan found"
    assert all(torch.equal(a, b.kept_words) for a, b in zip(once, seen, strict=True))


def test_a_sampler_may_go_back_to_an_earlier_group(planted, seen):
    session = session_with()
    for step in (0, 1, 2, 3, 4, 3, 4, 7, 2):
        begin(session, step, planted)
    first, middle, last = falling_densities(0.3)
    assert densities_of(seen) == pytest.approx([first, first, middle, first, middle, last, first], abs=0.02)


def test_the_bias_is_measured_under_the_mask_it_is_used_with(planted, seen, monkeypatch):
    measured, measure = [], TailBiasUpdate.measure

    def watch(self, key, step, scores, v, pattern, backend):
        measured.append((step, pattern.kept_words))
        return measure(self, key, step, scores, v, pattern, backend)

    monkeypatch.setattr(TailBiasUpdate, "measure", watch)
    session = session_with()
    for step in range(8):
        begin(session, step, planted)
    # Whenever a group begins.
    assert [step for step, _ in measured] == [s for s in (2, 4, 6) for _ in SITES]
    for number, (step, words) in enumerate(measured):
        assert torch.equal(seen[(step - DENSE) * len(SITES) + number % len(SITES)].kept_words, words)
    biases = [pattern.tail_bias for pattern in seen[:: len(SITES)]]
    assert not torch.equal(biases[0], biases[4])


def test_a_constant_density_is_another_plan_of_one_mask(planted, seen, tmp_path):
    store = PlanStore([], tmp_path)
    for schedule in ("falling", "constant"):
        session = session_with(store, density_schedule=schedule)
        for step in range(8):
            begin(session, step, planted)
        assert session.finish().plan_source == "calibrated on the way"
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert densities_of(seen)[6:] == pytest.approx([0.3] * 6, abs=0.01)
    assert len({pattern.kept_words.data_ptr() for pattern in seen[-6 * len(SITES) :]}) == len(SITES)  # made once
    report = session.finish()
    kept = exact(report.density)
    assert f"{kept} of the blocks kept on average: {kept} in 6 steps" in report.text()


def test_patterns_of_another_layout_stay(planted):
    calibrator = Calibrator(IDENTITY, MaskOptions(0.3, "mass", "shared", 64, 0.0, "falling"))
    calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])
    plan, cache, device = calibrator.plan({}), PatternCache(), torch.device("cpu")
    other = TokenLayout(TEXT + 5, GRID)
    one = cache.get(SITE, plan, 0, LAYOUT, 12, device)
    assert cache.get(SITE, plan, 2, other, 12, device).tables is one.tables  # of all sites of a grid
    assert torch.equal(one.mask, plan.sites[SITE].mask())
    assert len(cache) == 2 and cache.get(SITE, plan, 0, LAYOUT, 12, device).kept_words is one.kept_words
    cache.get(SITE, plan, 1, LAYOUT, 12, device)
    assert len(cache) == 2 and cache.get(SITE, plan, 0, LAYOUT, 12, device).kept_words is not one.kept_words


def test_a_moved_plan_moves_every_group(planted):
    calibrator = Calibrator(IDENTITY, MaskOptions(0.3, "mass", "shared", 64, 0.0, "falling"))
    calibrator.observe(SITE, LAYOUT, planted.q[:1], planted.k[:1], planted.v[:1])
    plan = calibrator.plan({})
    moved = plan.moved(TokenLayout(TEXT, (7, 11, 14)))
    assert moved.groups == 3 and moved.densities == plan.densities
    assert torch.equal(moved.sites[SITE].tail_bias, plan.sites[SITE].tail_bias)
