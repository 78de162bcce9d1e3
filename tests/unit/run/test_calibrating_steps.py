"""What calibration sees of a run, and what blocks are kept by because of it."""

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator, Method
from comfyui_paro.paro_runtime.config.recipes import mask_options, recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.file import load_plan
from comfyui_paro.paro_runtime.plan.plan import PlanError
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.run.session import Session
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .cases import IDENTITY, LAYOUT, SIGMAS, SITES, policy, sample, tensors, was_dense


@pytest.mark.parametrize(
    "change, criterion",
    [
        ({"dense_steps": 0}, "mass"),
        ({"dense_steps": 1}, "mass"),
        ({"dense_steps": 2}, "error"),
        ({"dense_steps": 1, "highest_noise": 1.005}, "mass"),
        ({"dense_steps": 1, "highest_noise": 1.4}, "error"),
        ({"dense_steps": 1, "method": Method(criterion="error")}, "error"),
        ({"dense_steps": 2, "method": Method(criterion="mass")}, "mass"),
        ({"dense_steps": 2, "tail": "off"}, "mass"),
    ],
    ids=["none dense", "one dense", "two dense", "noise", "from a picture", "errors forced", "mass forced", "dropping"],
)
def test_what_blocks_are_kept_by_depends_on_the_step_that_was_seen(tmp_path, change, criterion):
    """A first step of pure noise: by mass; a later one, or one with a picture in it: by error. The plan says which."""
    own = {name: change.pop(name) for name in ("method", "highest_noise") if name in change}
    kept = {}
    for name, more in (("found", own), *((kind, {"method": Method(criterion=kind)}) for kind in ("mass", "error"))):
        store = PlanStore([], tmp_path / name)
        session = Session(policy(Settings(**change), store), sigmas=SIGMAS, **more)
        sample(session)
        session.finish()
        plan = load_plan(next(store.writable.glob("*.safetensors")))
        kept[name] = plan.sites[SITES[0]].density
        if name == "found":
            assert plan.made["criterion"] == criterion
    assert torch.equal(kept["found"], kept[criterion])
    assert torch.equal(kept["mass"], kept["error"]) == (change.get("tail") == "off")


def test_a_grid_that_comes_later_is_not_seen_in_pure_noise():
    session = Session(policy(Settings(dense_steps=1)), sigmas=SIGMAS)
    for step in (2, 3):
        evaluation = session.begin(layout=LAYOUT, sigma=SIGMAS[step])
        for site in SITES:
            q, k, v = tensors(site, step)
            evaluation.attend(site, q, k, v, dense=lambda q=q, k=k, v=v: sdpa(q, k, v), blocks=3)
    assert session.finish().plan.made["criterion"] == "error"


@pytest.mark.parametrize("noise, criterion", [(0.96, "mass"), (0.92, "error")])
def test_what_is_seen_in_much_noise_is_told_by_attention(noise, criterion):
    """Errors of blocks mislead there, and the run measures its masks itself."""
    sigmas = [1.0, noise, 0.6, 0.4, 0.2, 0.0]
    sample(session := Session(policy(), sigmas=sigmas, highest_noise=1.0), sigmas=sigmas)
    report = session.finish()
    assert report.plan.made["criterion"] == criterion and report.sites_routed == (3 if criterion == "mass" else 0)
    # In a model whose highest noise is not known only the first step is certain.
    sample(session := Session(policy(), sigmas=sigmas), sigmas=sigmas)
    assert session.finish().plan.made["criterion"] == "error"


def test_a_calibrating_run_is_dense_and_feeds_the_chosen_steps():
    options = mask_options(Settings(), recipe_for("wan"))
    calibrator = Calibrator(IDENTITY, options)
    for _ in range(2):  # two prompts
        session = Session(policy(), sigmas=SIGMAS, calibrator=calibrator, calibrate_steps=frozenset({1, 3}))
        assert all(was_dense(pair) for pair in sample(session).values())
        session.finish()
    plan = calibrator.plan({})
    assert sorted(plan.sites) == SITES and plan.density == pytest.approx(0.3, abs=0.02)
    with pytest.raises(PlanError, match="began on the grid"):
        calibrator.observe(SITES[0], TokenLayout(0, (2, 8, 10)), *tensors(SITES[0], 0, TokenLayout(0, (2, 8, 10)))[:2])


def test_a_calibrating_run_keeps_blocks_by_error_whatever_steps_it_sees():
    """What is right for one video's first step was not measured for many; the offline default stays."""
    calibrator = Calibrator(IDENTITY, mask_options(Settings(), recipe_for("wan")))
    sample(Session(policy(), sigmas=SIGMAS, calibrator=calibrator, calibrate_steps=frozenset({0}), highest_noise=1.0))
    assert calibrator.plan({}).made["criterion"] == "error"


def test_all_evaluations_of_the_calibrating_step_are_seen_before_the_plan_is_made():
    """The host may run a step in several evaluations (low memory, other text lengths); here each shows another site."""
    session = Session(policy(), sigmas=SIGMAS)
    for step, sigma in enumerate(SIGMAS[:3]):
        for site in SITES[:2]:
            evaluation = session.begin(layout=LAYOUT, sigma=sigma)
            q, k, v = tensors(site, step)
            dense = sdpa(q, k, v)
            out = evaluation.attend(site, q, k, v, dense=lambda d=dense: d)
            assert (out is dense) == (step < 2)
            evaluation.end()
    assert sorted(session.finish().plan.sites) == SITES[:2]
