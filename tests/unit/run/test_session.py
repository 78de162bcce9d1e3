"""One run: what is dense in it, what passes through, and what the report says."""

import pytest
import torch
from comfyui_paro.kernels.attention.block_list_layout import held_bytes
from comfyui_paro.kernels.core.layout import TokenLayout, geometry_of
from comfyui_paro.paro_runtime.attention import patterns as patterns_module
from comfyui_paro.paro_runtime.attention.patterns import PatternCache, with_bias
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.file import load_plan
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.run.session import Session

from .cases import LAYOUT, SIGMAS, SITES, policy, sample, was_dense


def test_the_first_steps_are_dense_and_the_last_of_them_calibrates(tmp_path):
    session = Session(policy(store=PlanStore([], tmp_path)), sigmas=SIGMAS)
    results = sample(session)
    assert {step for (step, _), pair in results.items() if was_dense(pair)} == {0, 1}
    report = session.finish()
    assert (report.sites, report.sites_sparse, report.dense_steps) == (3, 3, 2)
    assert report.density == pytest.approx(0.3, abs=0.02)
    assert report.calls == {"sparse": 9, "dense step": 6}
    assert report.fallbacks == [] and report.notes == []
    assert report.plan_source == "calibrated on the way"
    plan = load_plan(next(tmp_path.glob("*.safetensors")))
    assert plan.made["step"] == 1 and sorted(plan.sites) == SITES


def test_dense_blocks_stay_dense_from_both_ends():
    session = Session(policy(Settings(dense_steps=1, dense_blocks="0, -1")), sigmas=SIGMAS)
    results = sample(session)
    assert {site.block_index for (step, site), pair in results.items() if step > 0 and not was_dense(pair)} == {1}
    report = session.finish()
    assert (report.sites, report.sites_sparse, report.sites_dense_blocks) == (3, 1, 2)


def test_density_1_at_16_bit_equals_dense_attention():
    settings = Settings(preset="custom", density=1.0, precision="16bit", dense_steps=0)
    session = Session(policy(settings), sigmas=SIGMAS)
    for out, dense in sample(session).values():
        assert (out - dense).abs().max() < 5e-6
    assert session.finish().sites_sparse == 3


def test_grouped_query_heads_run_sparse():
    session = Session(policy(), sigmas=SIGMAS)
    sample(session, kv_heads=2)
    report = session.finish()
    assert report.sites_sparse == 3 and report.fallbacks == []


def test_patterns_beyond_the_memory_for_them_are_made_anew(monkeypatch):
    expected = sample(Session(policy(), sigmas=SIGMAS))
    monkeypatch.setattr(patterns_module, "CACHE_BYTES", int(1.5 * held_bytes(geometry_of(LAYOUT, 64), 4)))
    session = Session(policy(), sigmas=SIGMAS)
    results = sample(session)
    assert len(session.patterns) == 1
    assert all(torch.equal(results[key][0], expected[key][0]) for key in expected)


@pytest.mark.parametrize(
    "settings, layout, reason",
    [
        (Settings(), TokenLayout(0, (1, 8, 10)), "80 grid tokens do not fill two blocks of 64"),
        (Settings(min_tokens=5000), LAYOUT, "320 grid tokens, below the minimum of 5000"),
    ],
)
def test_what_is_too_small_passes_through_with_a_reason(settings, layout, reason):
    session = Session(policy(settings), sigmas=SIGMAS)
    assert all(was_dense(pair) for pair in sample(session, layout=layout).values())
    report = session.finish()
    assert report.passed == [(reason, 15)] and report.sites == 0
    assert report.verdict().startswith(f"Not used: {reason}; nothing to do: ")


def test_the_bias_measured_in_the_run_replaces_the_plans():
    sample(session := Session(policy(), sigmas=SIGMAS))
    plan = session.finish().plan
    cache = PatternCache()
    arguments = (SITES[0], plan, 1, LAYOUT, 4, torch.device("cpu"))
    measured = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(with_bias(cache.get(*arguments), measured).tail_bias, measured)
    assert torch.equal(cache.get(*arguments).tail_bias, plan.sites[SITES[0]].tail_bias[1])
    assert with_bias(cache.get(*arguments), measured).kept_words is cache.get(*arguments).kept_words and len(cache) == 1


def test_state_does_not_cross_sessions():
    one, two = (Session(policy(), sigmas=SIGMAS) for _ in range(2))
    sample(one)
    assert two.finish().calls == {"sparse": 0} and two.finish().sites == 0


def test_the_report_serves_people_and_programs():
    said = []
    session = Session(policy(), sigmas=SIGMAS, on_status=said.append)
    sample(session)
    report = session.finish()
    assert said[0] == "step 1/5 · 320 tokens · dense" and said[-1] == report.status()
    values = report.as_dict()
    assert values["tokens"] == 325 and values["grid"] == [4, 8, 10] and "plan" not in values
    assert sum(values["orders_histogram"].values()) == 12
    picture = report.picture()
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and 0 <= picture.min() <= picture.max() <= 1
    assert "not faster" in report.text()
    assert set(report.step_seconds) == {"dense", "calibrating", "sparse"} and report.gain > 0
