"""Plans that runs make for themselves: without a dense step where there is none, and without those of other runs."""

from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.calibration import tail_fit
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator
from comfyui_paro.paro_runtime.calibration.planning import Planner
from comfyui_paro.paro_runtime.config.recipes import mask_options, recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.options import GROUPS
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.run.session import Session
from comfyui_paro.paro_runtime.run.tail_bias import TailBiasUpdate

from .cases import IDENTITY, LAYOUT, SIGMAS, SITES, policy, sample, tensors, was_dense


def test_a_sparse_step_without_a_plan_uses_what_it_sees(monkeypatch):
    """Each site has masks of its own in that step, under which nothing is measured for later; from the next step on
    they share a plan, and everything is measured under that."""
    budgets, measured = [], []
    entries, measure = Planner.entries, TailBiasUpdate.measure

    def planned(self, *rest):
        budgets.append(len(self.sites))
        return entries(self, *rest)

    def measuring(self, key, step, scores, v, pattern, backend):
        measured.append((step, key[0], pattern.mask))
        return measure(self, key, step, scores, v, pattern, backend)

    monkeypatch.setattr(Planner, "entries", planned)
    monkeypatch.setattr(TailBiasUpdate, "measure", measuring)
    session = Session(
        policy(Settings(density=0.3, dense_steps=0, density_schedule="constant")), sigmas=SIGMAS, highest_noise=9.0
    )
    results = sample(session)
    assert not any(map(was_dense, results.values()))
    (grid,) = session.grids()
    assert grid.plan is not None and grid.begun is None  # masks that served one step are not kept for the others
    assert budgets == [1] * len(SITES) + [len(SITES)] and {step for step, *_ in measured} == {1}
    report = session.finish()
    assert report.calls == {"sparse": 15} and not report.notes
    assert (report.plan_source, report.plan.made["step"]) == ("calibrated on the way", 0)
    assert all(torch.equal(mask, report.plan.sites[site].mask()) for _, site, mask in measured)
    assert report.density == pytest.approx(0.3, abs=0.02)


def test_a_site_that_cannot_be_planned_alone_is_dense_until_there_is_a_plan(monkeypatch):
    def fail(self, site, group):
        raise MemoryError("no room for its masks")

    monkeypatch.setattr(Calibrator, "plan_of", fail)
    session = Session(policy(Settings(dense_steps=0)), sigmas=SIGMAS)
    results = sample(session)
    assert {step for (step, _), pair in results.items() if was_dense(pair)} == {0}
    report = session.finish()
    assert report.calls == {"sparse": 12, "no plan yet": 3} and "has no plan of its own" in report.notes[0]
    with pytest.raises(MemoryError):
        sample(Session(policy(Settings(dense_steps=0, strict=True)), sigmas=SIGMAS))


def test_plans_of_other_runs_are_left_alone_unless_they_are_to_be_remembered(tmp_path):
    store = PlanStore([], tmp_path)
    sample(first := Session(policy(store=store), sigmas=SIGMAS))
    kept = first.finish().plan
    own = replace(policy(store=store), remember=False)
    sample(session := Session(own, sigmas=SIGMAS))
    report = session.finish()
    assert report.plan_source == "calibrated on the way" and not report.notes
    assert len(list(tmp_path.iterdir())) == 1
    # Where calibrating is forbidden there is nothing better, and what was made on purpose always serves.
    no_other = replace(own, settings=Settings(density=0.3, dense_steps=2, calibrate=False))
    sample(session := Session(no_other, sigmas=SIGMAS))
    assert session.finish().plan_source == "plan found"
    store.save(replace(kept, made={**kept.made, "by": "PARO Calibrate"}))
    sample(session := Session(own, sigmas=SIGMAS))
    assert session.finish().plan_source == "plan found"


def test_a_site_alone_has_masks_of_the_step_that_wants_them():
    """Those of every group would take three times the memory of a whole plan beside the plan that follows."""
    options = mask_options(Settings(dense_steps=0, density=0.4), recipe_for("wan"))
    calibrator = Calibrator(IDENTITY, options)
    calibrator.observe(SITES[0], LAYOUT, *tensors(SITES[0], 0))
    every = calibrator.plan({})
    assert every.groups == GROUPS
    for group in range(GROUPS):
        alone = calibrator.plan_of(SITES[0], group)
        assert alone.groups == 1
        assert torch.equal(alone.sites[SITES[0]].mask(), every.sites[SITES[0]].mask(group=group))
        assert torch.equal(alone.sites[SITES[0]].tail_bias[0], every.sites[SITES[0]].tail_bias[group])


def test_a_plan_that_lacks_a_site_is_not_kept(tmp_path, monkeypatch):
    """Every later run would find it, and have no masks there."""
    observe = Calibrator.observe

    def failing(self, site, *rest, **more):
        if site == SITES[1]:
            raise RuntimeError("no room")
        return observe(self, site, *rest, **more)

    monkeypatch.setattr(Calibrator, "observe", failing)
    store = PlanStore([], tmp_path)
    sample(session := Session(policy(store=store), sigmas=SIGMAS))
    assert "plan: not kept, double.1.0 could not be observed" in session.finish().notes and store.names() == []
    monkeypatch.undo()
    sample(session := Session(policy(store=store), sigmas=SIGMAS))
    assert session.finish().sites_sparse == len(SITES) and len(store.names()) == 1


def test_sites_of_another_grid_are_not_missed(tmp_path):
    """A U-Net attends on several grids, each with a plan of its own."""
    half, store = TokenLayout(0, (2, 8, 10), 0), PlanStore([], tmp_path)
    session = Session(policy(store=store), sigmas=SIGMAS)
    for step, sigma in enumerate(SIGMAS[:-1]):
        for layout, sites in ((LAYOUT, SITES[:2]), (half, SITES[2:])):
            evaluation = session.begin(layout=layout, sigma=sigma)
            for site in sites:
                evaluation.attend(site, *tensors(site, step, layout), dense=lambda: None)
            evaluation.end()
    report = session.finish()
    assert report.sites_sparse == len(SITES) and not report.notes and len(store.names()) == 2


def test_a_bias_that_the_run_measures_is_not_worked_out_before(monkeypatch):
    """Trying biases on what the dense step shows changes nothing in a run that measures them under its masks."""
    tried, results = [], []
    try_biases = tail_fit._curves
    monkeypatch.setattr(tail_fit, "_curves", lambda *rest, **more: tried.append(1) or try_biases(*rest, **more))
    make = Calibrator.__init__
    for always in (False, True):
        if always:
            monkeypatch.setattr(Calibrator, "__init__", lambda *a, **more: make(*a, **{**more, "bias_later": False}))
        sample_of = Session(replace(policy(), remember=False), sigmas=SIGMAS)
        results.append((sample(sample_of), sample_of.finish(), len(tried)))
    (few, report, none), (many, other, some) = results
    assert none == 0 and some > 0
    assert report.calls == other.calls == {"sparse": 9, "dense step": 6}
    assert all(torch.equal(few[key][0], many[key][0]) for key in few)
    # What sees its masks itself, without a dense step, goes by what it sees; plans for other runs have a bias.
    monkeypatch.setattr(Calibrator, "__init__", make)
    for session in (
        Session(replace(policy(Settings(dense_steps=0)), remember=False), sigmas=SIGMAS),
        Session(policy(), sigmas=SIGMAS),
    ):
        before = len(tried)
        sample(session)
        assert len(tried) > before
