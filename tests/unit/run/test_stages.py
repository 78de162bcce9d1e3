"""Steps and stages: which step an evaluation belongs to, and which part of a whole schedule a run is."""

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.schedule import Schedule, StepFinder, place_in_whole
from comfyui_paro.paro_runtime.run.session import Session

FALLING = [1.0, 0.75, 0.5, 0.25, 0.0]
# sigmas, evaluations, their steps: one between two sigmas belongs to the step that it is part of
EVALUATIONS = [
    (FALLING, [1.0, 0.75, 0.5, 0.25], [0, 1, 2, 3]),
    (FALLING, [1.0, 0.75, 0.75, 0.5, 0.5, 0.25], [0, 1, 1, 2, 2, 3]),  # heun
    (FALLING, [1.0, 0.86, 0.75, 0.6, 0.0], [0, 0, 1, 1, 3]),
    (FALLING, [1.0, 0.7500001, 0.4999999], [0, 1, 2]),  # half precision moved them
    (FALLING, [1.0, 0.5, 0.25], [0, 2, 3]),  # another node skipped one
    (FALLING, [1.6, 0.75], [0, 1]),
    ([14.6, 3.1, 0.4, 0.03, 0.0], [14.6, 3.1, 0.4, 0.031, 0.029], [0, 1, 2, 2, 3]),
    ([0.5], [0.5], [0]),
    ([0.8, 0.6, 0.4], [0.8, 0.6, 0.4], [0, 1, 1]),  # a stage that ends in noise
    ([0.0001, 0.25, 0.5, 0.9], [0.0001, 0.1, 0.25, 0.5, 0.9], [0, 0, 1, 2, 2]),  # rising
    (FALLING, [1.0, 0.75, 0.5, 0.75, 0.5, 0.25], [0, 1, 2, 1, 2, 3]),  # the sampler goes back
    ([1.0, 0.6, 0.2, 0.6, 0.2, 0.0], [1.0, 0.6, 0.2, 0.6, 0.2], [0, 1, 2, 3, 4]),  # the schedule does
    (FALLING, [1.4, 1.05, 0.7, 0.35], [0, 1, 2, 3]),  # s_churn, euler
    (FALLING, [1.4, 0.75, 1.05, 0.5, 0.7, 0.25, 0.35], [0, 1, 1, 2, 2, 3, 3]),  # s_churn, heun
    (FALLING, [1.4, 1.05, 0.5, 0.25], [0, 1, 2, 3]),  # s_churn that ends at s_tmin
]


@pytest.mark.parametrize("sigmas, evaluations, steps", EVALUATIONS)
def test_the_step_of_an_evaluation(sigmas, evaluations, steps):
    finder, found = StepFinder(sigmas), [-1]
    for sigma in evaluations:
        found.append(finder.find(sigma, found[-1]))
    assert found[1:] == steps


def flow(shift):
    """A flow model's sigma at a share of its time, and the inverse."""

    def to_sigma(gone):
        return shift * (1 - gone) / (1 + (shift - 1) * (1 - gone))

    return to_sigma, lambda sigma: 1 - sigma / (shift - (shift - 1) * sigma)


def beta(steps, alpha=0.6):
    """Shares of the time at the steps of the host's beta schedule: fine at both ends."""
    grid = torch.linspace(0, 1, 100001, dtype=torch.float64)
    density = (grid * (1 - grid)).clamp_min(1e-12) ** (alpha - 1)
    cumulated = density.cumsum(0) / density.sum()
    return [float(grid[torch.searchsorted(cumulated, i / steps).clamp(max=100000)]) if i else 0.0 for i in range(steps)]


# the parts of a schedule, and its dense steps in each
SPLITS = [
    ([4], [1]),
    ([2, 2], [1, 0]),
    ([2, 2, 2], [1, 0, 0]),
    ([1, 1, 1, 1], [1, 0, 0, 0]),
    ([1, 3, 4], [1, 0, 0]),
    ([10, 10], [4, 0]),
    ([6, 14], [4, 0]),
    ([2, 18], [2, 2]),
    ([1, 1, 1, 1, 1, 15], [1, 1, 1, 1, 0, 0]),
    ([25, 25], [10, 0]),
    ([100], [20]),
]


@pytest.mark.parametrize("shift", [1, 3, 5, 8])
@pytest.mark.parametrize("parts, dense", SPLITS, ids=lambda numbers: "+".join(map(str, numbers)))
def test_dense_steps_are_those_of_the_whole_schedule(parts, dense, shift):
    steps, recipe = sum(parts), recipe_for("wan")
    to_sigma, time_gone = flow(shift)
    sigmas, first, found = [to_sigma(i / steps) for i in range(steps + 1)], 0, []
    groups = []
    for part in parts:
        schedule = Schedule.of_run(sigmas[first : first + part + 1], recipe.dense_steps, "", time_gone)
        assert (schedule.steps, schedule.whole, schedule.before) == (part, steps, first)
        found.append(schedule.dense_steps)
        groups += [schedule.group(step, 3) for step in range(part)]
        first += part
    assert found == dense and sum(found) == recipe.dense_steps(steps)
    whole = Schedule.of_run(sigmas, recipe.dense_steps, "", time_gone)
    assert groups == [whole.group(step, 3) for step in range(steps)]


@pytest.mark.parametrize("parts, dense", [([2, 2], [1, 0]), ([1, 1, 1, 1], [1, 0, 0, 0]), ([10, 10], [4, 0])])
def test_steps_that_are_not_spread_evenly(parts, dense):
    to_sigma, time_gone = flow(8)
    sigmas, first, found = [*map(to_sigma, beta(sum(parts))), 0.0], 0, []
    for part in parts:
        part_of = sigmas[first : first + part + 1]
        found.append(Schedule.of_run(part_of, recipe_for("wan").dense_steps, "", time_gone).dense_steps)
        first += part
    assert found == dense


def test_a_part_whose_steps_say_nothing_of_the_whole_counts_its_own():
    to_sigma, time_gone = flow(1)
    nearly_noise = [to_sigma(i / 1000) for i in range(11)]
    assert place_in_whole(nearly_noise, time_gone) == (10, 0)
    assert place_in_whole(nearly_noise[::-1], time_gone) == (10, 0)  # unsampling
    assert place_in_whole([0.5, 0.25, 0.0], None) == (2, 0)
    assert place_in_whole([0.5], time_gone) == (1, 0)
    late = [to_sigma(0.9 + i / 1000) for i in range(11)]
    assert Schedule.of_run(late, recipe_for("wan").dense_steps, "", time_gone).dense_steps == 0


def test_the_users_number_is_of_the_whole_too():
    sigmas, (_, time_gone) = [1 - i / 10 for i in range(11)], flow(1)
    parts = sigmas[:3], sigmas[2:6], sigmas[5:]
    for wanted, dense in ((0, [0, 0, 0]), (1, [1, 0, 0]), (4, [2, 2, 0]), (10000, [2, 3, 5])):
        assert [Schedule.of_run(part, lambda _, n=wanted: n, "", time_gone).dense_steps for part in parts] == dense


LAYOUT = TokenLayout(3, (4, 8, 10), 2)
SITES = [Site("double", i) for i in range(2)]


def stage(store, sigmas, evaluations=None, **settings):
    """Run a stage of a flow model without shift; returns its report."""
    policy = Policy(
        ModelIdentity("wan", "a" * 16, "b" * 16), recipe_for("wan"), Settings(**settings), None, store, remember=True
    )
    session = Session(policy, sigmas=sigmas, highest_noise=1.0, time_gone=lambda sigma: 1 - sigma)
    for number, sigma in enumerate(evaluations or sigmas[:-1]):
        evaluation = session.begin(layout=LAYOUT, sigma=sigma)
        for site in SITES:
            generator = torch.Generator().manual_seed(100 * site.block_index + number)
            q, k, v = (torch.randn(1, 4, LAYOUT.length, 32, generator=generator) for _ in range(3))
            evaluation.attend(site, q, k, v, dense=lambda q=q: torch.zeros_like(q), blocks=2)
        evaluation.end()
    return session.finish()


def test_a_stage_that_must_calibrate_needs_no_dense_step_for_it(tmp_path):
    store = PlanStore([], tmp_path)
    for source in ("calibrated on the way", "plan found"):
        report = stage(store, [0.5, 0.25, 0.0])
        assert (report.dense_steps, report.steps, report.why_dense) == (0, 2, "")
        assert report.plan_source == source and report.calls == {"sparse": 4}
        assert report.verdict().startswith("2 of 2 steps sparse")
    alone = stage(None, [0.5, 0.25])
    assert (alone.dense_steps, alone.sites_sparse, alone.plan_source) == (0, 2, "calibrated on the way")
    # Of pure noise as it is, a plan that was found spares the step.
    store = PlanStore([], tmp_path / "noise")
    assert stage(store, [1.0, 0.75]).why_dense == "the first 1 of about 4 are"
    report = stage(store, [0.75, 0.5])
    assert (report.plan_source, report.dense_steps, report.sites_sparse) == ("plan found", 0, 2)
    assert report.plan.made["criterion"] == "mass" and report.sites_routed == 2


def test_a_stage_that_sees_more_than_noise_in_a_dense_step_makes_a_better_plan(tmp_path):
    store = PlanStore([], tmp_path)
    for begin, source, criterion in ((0, "calibrated on the way", "mass"), (2, "calibrated on the way", "error")):
        report = stage(store, [1 - begin / 20, 0.95 - begin / 20])
        assert (report.plan_source, report.plan.made["criterion"]) == (source, criterion)
        assert report.dense_steps == 1 and report.why_dense == "the first 4 of about 20 are"


def test_without_calibration_every_step_is_dense_and_counted(tmp_path):
    report = stage(None, FALLING, calibrate=False)
    assert (report.dense_steps, report.steps) == (4, 4)


def test_steps_that_happened_are_counted(tmp_path):
    store = PlanStore([], tmp_path)
    again = [1.0, 0.75, 0.5, 1.0, 0.75, 0.5, 0.25]
    for _ in range(2):
        report = stage(store, FALLING, again)
        assert (report.dense_steps, report.steps) == (2, 7) and report.calls == {"sparse": 10, "dense step": 4}
    report = stage(store, FALLING, [1.0, 0.25])
    assert (report.dense_steps, report.steps) == (1, 4)
    # A plan is made when the step that it was made of is over, wherever the sampler goes on.
    report = stage(None, FALLING, [0.5, 0.75, 0.5, 0.25], dense_steps=0)
    assert (report.dense_steps, report.calls) == (0, {"sparse": 8})


def test_a_run_follows_other_sigmas(tmp_path):
    policy = Policy(ModelIdentity("wan", "a" * 16, "b" * 16), recipe_for("wan"), Settings(), None, None)
    session = Session(policy, sigmas=[1.0, 0.0], highest_noise=1.0, time_gone=lambda sigma: 1 - sigma)
    assert (session.steps, session.schedule.dense_steps) == (1, 1)
    session.follow([1 - i / 20 for i in range(21)])
    assert (session.steps, session.schedule.dense_steps) == (20, 4)
    assert session.begin(layout=LAYOUT, sigma=0.5).step == 10
    session.follow(FALLING)
    assert session.begin(layout=LAYOUT, sigma=0.5).step == 2
    session.follow([0.9, 0.7, 0.5, 0.0])
    assert session.begin(layout=LAYOUT, sigma=0.5).step == 2
    assert session.finish().steps == 3 == session.log.clock.happened
