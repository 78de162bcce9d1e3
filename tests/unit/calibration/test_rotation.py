"""Sites whose keys have outlying channels are found while calibrating, planned as rotated, and run more exactly."""

import pytest
import torch
from comfyui_paro.kernels.core.inputs import ScoreInputs
from comfyui_paro.kernels.core.layout import Geometry, TokenLayout
from comfyui_paro.kernels.statistics.logit_errors import PLAIN, ROTATED, UNSMOOTHED, logit_errors
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator
from comfyui_paro.paro_runtime.calibration.outlier_rotation import root_means, rotates
from comfyui_paro.paro_runtime.compiling import self_check as self_check_module
from comfyui_paro.paro_runtime.compiling.self_check import site_precision
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.options import MaskOptions
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Plan, Site, SitePlan
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session
from torch.nn.functional import scaled_dot_product_attention as sdpa

IDENTITY = ModelIdentity("wan", "a" * 16, "b" * 16)
LAYOUT = TokenLayout(3, (4, 8, 10), 2)
GEOMETRY = Geometry(3, (4, 8, 10), 2)
PLAIN_SITE, OUTLIER_SITE = Site("double", 0), Site("double", 1)


def call(site, kv_heads=4, batch=1):
    """Unit normal values; at the outlier site four channels of K are eight times as large, from token to token."""
    q, k, v = (torch.randn(batch, heads, LAYOUT.length, 64) for heads in (4, kv_heads, kv_heads))
    if site == OUTLIER_SITE:
        k[..., :4] *= 8
    return q, k, v


def tables():
    return torch.stack([torch.randperm(LAYOUT.grid_tokens) for _ in range(4)])


@pytest.mark.parametrize("kv_heads, batch", [(4, 1), (2, 2)])
def test_outliers_that_change_from_token_to_token_want_a_rotation(kv_heads, batch):
    weight = torch.ones(4)
    q, k, _ = call(PLAIN_SITE, kv_heads, batch)
    errors = logit_errors(ScoreInputs(q, k), GEOMETRY, tables())
    assert errors.shape == (4, 3) and not rotates(*root_means([(errors, weight)]))
    q, k, _ = call(OUTLIER_SITE, kv_heads, batch)
    errors = logit_errors(ScoreInputs(q, k), GEOMETRY, tables())
    assert rotates(*root_means([(errors, weight)])) and (errors[:, PLAIN] > 3 * errors[:, ROTATED]).all()


def test_a_constant_outlier_is_smoothed_away():
    q, k, _ = call(PLAIN_SITE)
    k[..., :4] += 30
    errors = logit_errors(ScoreInputs(q, k), GEOMETRY, tables())
    assert not rotates(*root_means([(errors, torch.ones(4))])) and (errors[:, UNSMOOTHED] > 10 * errors[:, PLAIN]).all()


def test_the_measured_error_is_that_of_the_logits():
    """All queries and keys of one small head, against quantisation written out; the last block of keys is short."""
    g = Geometry(0, (1, 4, 20), 0)
    q, k = torch.randn(2, 1, 1, 80, 32, dtype=torch.float64)
    found = logit_errors(ScoreInputs(q.float(), k.float()), g, torch.arange(80)[None])[0, PLAIN]
    rows = torch.linspace(0, 79, 16).round().long()
    centred = k[0, 0] - k[0, 0].mean(0)
    wide = q[0, 0, rows]
    rounded_q = (wide / wide.abs().amax(1, keepdim=True) * 127).round() / 127 * wide.abs().amax(1, keepdim=True)
    parts = [part / part.abs().max() * 127 for part in centred.split(64)]
    rounded_k = torch.cat(
        [x.round() / 127 * part.abs().max() for x, part in zip(parts, centred.split(64), strict=True)]
    )
    # The 16 keys of the short block stand for 64 places there.
    taken = torch.cat([torch.arange(80), torch.full((48,), 64)])
    exact = (wide @ centred.T / 32**0.5)[:, taken]
    wrong = (rounded_q @ rounded_k.T / 32**0.5)[:, taken] - exact
    weights = exact.softmax(1)
    mean = (weights * wrong).sum(1, keepdim=True)
    expected = (weights * (wrong - mean) ** 2).sum(1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.fixture(scope="module")
def plan() -> Plan:
    calibrator = Calibrator(IDENTITY, MaskOptions(0.5, "mass", "shared", 64))
    for step in range(2):
        for site in (PLAIN_SITE, OUTLIER_SITE):
            calibrator.observe(site, LAYOUT, *call(site), step=step)
    return calibrator.plan({})


def test_a_plan_rotates_the_sites_that_need_it(plan):
    assert [plan.sites[site].rotate for site in (PLAIN_SITE, OUTLIER_SITE)] == [False, True]
    errors = plan.made["int8_logit_error"]
    assert errors["plain"] > 1.3 * errors["rotated"] > 0
    moved = plan.moved(TokenLayout(3, (4, 10, 8), 2))
    assert [moved.sites[site].rotate for site in (PLAIN_SITE, OUTLIER_SITE)] == [False, True]


def run_error(plan: Plan, precision: str = "int8") -> tuple[dict[Site, float], Session]:
    """Relative L2 against dense attention of one step in which every block is kept, by site."""
    settings = Settings(preset="custom", density=1.0, dense_steps=0, precision=precision)
    session = Session(Policy(IDENTITY, recipe_for("wan"), settings, plan), sigmas=[1.0, 0.0], refresh=False)
    evaluation, errors = session.begin(layout=LAYOUT, sigma=1.0), {}
    for site in (PLAIN_SITE, OUTLIER_SITE):
        generator = torch.Generator().manual_seed(site.block_index)
        q, k, v = torch.randn(3, 1, 4, LAYOUT.length, 64, generator=generator)
        if site == OUTLIER_SITE:
            k[..., :4] *= 8
        dense = sdpa(q, k, v)
        out = evaluation.attend(site, q, k, v, dense=lambda d=dense: d)
        assert not torch.equal(out, dense)
        errors[site] = ((out - dense).norm() / dense.norm()).item()
    return errors, session


def with_everything_kept(plan: Plan, rotate: bool | None = None) -> Plan:
    sites = {}
    for site, entry in plan.sites.items():
        mask = torch.ones(entry.shape, dtype=torch.bool)
        its = entry.rotate if rotate is None else rotate
        sites[site] = SitePlan.create(entry.orders, mask, None, entry.mass_kept[0], rotate=its)
    return Plan(plan.identity, plan.layout, plan.block_q, sites, plan.pool, plan.settings, plan.made)


def test_a_rotated_site_is_more_exact_in_a_run(plan):
    chosen, session = run_error(with_everything_kept(plan))
    never, _ = run_error(with_everything_kept(plan, False))
    assert chosen[OUTLIER_SITE] < 0.5 * never[OUTLIER_SITE]
    assert chosen[PLAIN_SITE] == never[PLAIN_SITE]
    report = session.finish()
    assert report.sites_rotated == 1 and "1 of 2 attention layers marked for" in report.text()


def test_only_int8_follows_the_plan():
    q = torch.randn(1, 1, 8, 64)
    assert site_precision("int8_pv8", True, q, "reference", 64, 64)[0].hadamard
    assert not site_precision("int8_pv8", False, q, "reference", 64, 64)[0].hadamard
    assert not site_precision("16bit", True, q, "reference", 64, 64)[0].hadamard
    assert site_precision("int4", False, q, "reference", 64, 64)[0].hadamard


def test_a_rotated_kernel_that_fails_its_check_is_not_used(monkeypatch):
    def check(device, dtype, head_dim, precision, backend, **sizes):
        return "wrong" if precision.hadamard else None

    monkeypatch.setattr(self_check_module, "self_check", check)
    precision, reason = site_precision("int8", True, torch.randn(1, 1, 8, 64), "reference", 64, 64)
    assert not precision.hadamard and reason == "wrong"


def test_a_run_without_the_rotation_that_its_plan_wants_says_so(monkeypatch, plan):
    """For want of memory, say: told once, and not tried again, so that all sites and steps are alike."""
    asked, never = [], run_error(with_everything_kept(plan, False))[0]
    reason = "self-check: the kernels cannot run (OutOfMemoryError: no memory)"

    def check(device, dtype, head_dim, precision, backend, **sizes):
        asked.append(precision)
        return reason

    monkeypatch.setattr(self_check_module, "self_check", check)
    errors, session = run_error(with_everything_kept(plan, True))
    assert errors == never and [precision.hadamard for precision in asked] == [True]
    assert session.finish().notes == [f"queries and keys are not rotated where the plan wants it: {reason}"]
