"""What a run says of itself: one sentence, true in every odd run, and details only about what happened."""

from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator
from comfyui_paro.paro_runtime.compiling.readiness import COMPILING
from comfyui_paro.paro_runtime.config.recipes import mask_options, recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.report import reasons
from comfyui_paro.paro_runtime.report.facts import Timing
from comfyui_paro.paro_runtime.report.picture import plan_picture
from comfyui_paro.paro_runtime.report.reasons import LINE, NOT_ON_IT, OFF, hint_of, layer_words, not_used, stopped
from comfyui_paro.paro_runtime.report.report import Report
from comfyui_paro.paro_runtime.report.verdict import exact, share
from comfyui_paro.paro_runtime.run import evaluation as evaluation_module
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.schedule import StepClock
from comfyui_paro.paro_runtime.run.session import Session
from torch.nn.functional import scaled_dot_product_attention as sdpa

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
LAYOUT, SMALLER = TokenLayout(3, (4, 8, 10), 2), TokenLayout(3, (4, 8, 8), 2)
TINY = TokenLayout(0, (1, 8, 10))
IDENTITY = ModelIdentity("wan", "a" * 16, "b" * 16)
SITES = [Site("double", 0), Site("block", 1, 1)]
NEVER = (
    "attention error",
    "blocks kept",
    "of the blocks",
    "sparse step",
    "0 attention layer",
    ": ,",
    "nan",
)
"""Not to be said of a run in which nothing was sparse."""


DEFAULT = Settings(density=0.3, dense_steps=2)


def run(settings=None, sigmas=SIGMAS, layouts=(LAYOUT,), plan=None, store=None, **more) -> Report:
    policy = Policy(IDENTITY, recipe_for("wan"), settings or DEFAULT, plan, store, remember=True)
    session = Session(policy, sigmas=sigmas, **more)
    for step, sigma in enumerate(sigmas[:-1]):
        for layout in layouts:
            evaluation = session.begin(layout=layout, sigma=sigma)
            for number, site in enumerate(SITES):
                generator = torch.Generator().manual_seed(10 * step + number)
                q, k, v = torch.randn(3, 1, 4, layout.length, 32, generator=generator)
                evaluation.attend(site, q, k, v, dense=lambda q=q, k=k, v=v: sdpa(q, k, v), blocks=2)
            evaluation.end()
    return session.finish()


@pytest.fixture(scope="module")
def sparse() -> Report:
    return run()


def by_triton(report: Report, dense: Timing | None = None, **changes) -> Report:
    """As it would be on a GPU, its sparse steps a second long."""
    timing = {"sparse": Timing(1.0, 3), **({"dense": dense} if dense else {})}
    changes = {"backend": "triton", "device": "cuda:0", "attention_error": (0.009, 0.021), **changes}
    return replace(report, facts=replace(report.facts, timing=timing), **changes)


def check(report: Report, verdict: str) -> str:
    """Its sentence is this, everywhere, on one line; returns the text."""
    assert report.verdict() == verdict
    assert report.status().startswith(verdict) and report.text().splitlines()[0] == verdict
    assert len(report.status()) <= max(LINE, len(verdict)) and "\n" not in report.status()
    if not report.facts.sparse_steps:
        assert not any(words in report.text() for words in NEVER), report.text()
    return report.text()


def test_faster_is_said_of_sparse_steps_against_the_runs_own_dense_ones(sparse):
    found = check(by_triton(sparse, Timing(1.9, 2)), "1.9x faster per step: 3 of 5 steps sparse, attention error 0.9 %")
    assert "measured: sparse steps 1.90x as fast as this run's own dense steps; not the whole run's gain" in found
    assert "a dense step took 1.90 s (median of 2)" in found
    found = check(
        by_triton(sparse, Timing(1.9, 1, first=True)),
        "1.9x faster per step than the first, dense one: 3 of 5 steps sparse, attention error 0.9 %",
    )
    assert "a dense step took 1.90 s, the run's first, which may also load things" in found
    check(
        by_triton(sparse, Timing(0.8, 2)),
        "No gain per step: sparse steps took 1.25x the time of dense ones, 3 of 5 steps sparse, attention error 0.9 %",
    )


def test_without_a_dense_step_a_gain_is_expected(sparse):
    check(
        by_triton(sparse, expected_gain=(1.62, 2.04)),
        "3 of 5 steps sparse, attention error 0.9 %, expected 1.6x to 2.0x per step",
    )
    check(
        by_triton(sparse, expected_gain=(1.11, 1.12), attention_error=None),
        "3 of 5 steps sparse, expected about 1.1x per step",
    )


def test_the_reference_is_right_but_not_faster(sparse):
    assert "dense" in sparse.facts.timing  # the times are there, and say nothing
    error = share(sparse.attention_error[0])
    found = check(
        sparse,
        f"3 of 5 steps sparse, attention error {error}: right but not faster, by the PyTorch reference on the CPU",
    )
    assert "x as fast" not in found and "expected" not in found
    assert "set backend to auto" in replace(sparse, device="cuda:0").verdict()


def test_the_status_holds_what_a_line_can(sparse):
    found = by_triton(sparse, Timing(1.9, 2), tokens=75_600).status()
    verdict = "1.9x faster per step: 3 of 5 steps sparse, attention error 0.9 %"
    assert found == f"{verdict} · wan · 75,600 tokens · 30 % of blocks kept · {sparse.precision}"


def test_details_are_in_plain_words(sparse):
    found = sparse.text()
    assert "2 of 2 attention layers sparse" in found and "made in this run, of what step 2 showed" in found
    first, middle, last = map(exact, sparse.densities)
    assert f"{first} in 1 step, {middle} in 1 step, {last} in 1 step" in found and first != last
    assert not any(word in found for word in ("site", "double.0.0", "mean quer", "attention kept", "masks measured"))


def test_kernels_that_are_being_compiled(sparse):
    calls = {**sparse.calls, COMPILING: 2}
    compiled = "Kernels were being compiled in this run, once on this machine: the next run is faster"
    check(by_triton(sparse, Timing(5.0, 1), calls=calls), f"{compiled} (3 of 5 steps sparse)")
    nothing = replace(run(Settings(calibrate=False, dense_steps=1)), fallbacks=[], calls={"sparse": 0, COMPILING: 10})
    check(nothing, f"{compiled} (no step was sparse)")
    # The next run would be as dense.
    check(
        replace(run(Settings(dense_steps=9)), calls=calls),
        "No gain: all 5 steps were dense; lower dense_steps in PARO Settings",
    )


def test_fallbacks_are_counted_and_named(sparse):
    reasons_of = [("double.0.0: the result is not finite", 2), ("block.1.1: the result is not finite", 1)]
    found = check(
        by_triton(sparse, Timing(1.9, 2), fallbacks=reasons_of),
        "1.9x faster per step: 3 of 5 steps sparse, attention error 0.9 %; 3 calls fell back: the result is not finite",
    )
    assert (
        "3 calls fell back to ComfyUI's attention: the result is not finite (double block 0, block 1, attention 2); "
        in found
    )
    assert "set precision to 16bit" in found
    assert "; 1 call fell back: " in by_triton(sparse, fallbacks=reasons_of[1:]).verdict()


def test_a_run_of_one_step():
    check(
        run(Settings(dense_steps=1), SIGMAS[-2:]),
        "No gain: the only step was dense; lower dense_steps in PARO Settings",
    )
    # Without a dense step it is sparse, in one of three groups: the others never came.
    found = run(Settings(dense_steps=0), SIGMAS[-2:])
    assert found.verdict().startswith("1 of 1 step sparse") and found.facts.groups == ((found.densities[1], 1),)
    assert f"{exact(found.densities[1])} of the blocks kept on average" in found.text()


def test_every_step_dense():
    check(run(Settings(dense_steps=9)), "No gain: all 5 steps were dense; lower dense_steps in PARO Settings")
    found = check(
        run(Settings(dense_steps=2, dense_blocks="0-1")),
        "No gain: all 5 steps were dense: blocks that the settings keep dense; "
        "take blocks out of dense_blocks in PARO Settings",
    )
    assert "2 of them dense because of dense_blocks" in found and "- no plan" in found
    part = run(Settings(dense_steps=1), [1.0, 0.75], time_gone=lambda sigma: 1 - sigma)
    check(
        part, "No gain: the only step was dense, the first 1 of about 4 are; nothing to do if another sampler goes on"
    )
    kept = replace(
        run(Settings(calibrate=False)),
        fallbacks=[],
        calls={"every block kept: 320 grid tokens, sparse from 900 on": 10},
    )
    assert kept.verdict().startswith("Little gain: all 5 steps were dense: every block kept: 320")


def test_a_latent_too_small_for_paro():
    found = check(
        run(layouts=[TINY]),
        "Not used: 80 grid tokens do not fill two blocks of 64; nothing to do: so short a sequence gains little",
    )
    assert "10 calls left to ComfyUI: 80 grid tokens" in found and "no plan" not in found


def test_calibrate_off_without_a_plan():
    found = check(
        run(Settings(dense_steps=1, calibrate=False)),
        "No gain: all 5 steps were dense: there is no plan, and calibrate is off; "
        "switch calibrate on in PARO Settings, or give a plan",
    )
    assert "Plan\n- no plan\n" in found


def test_a_plan_that_could_not_be_made_is_not_said_to_be_forbidden(monkeypatch):
    def scarce(self, made):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Calibrator, "plan", scarce)
    found = run()
    assert found.verdict().startswith(
        "No gain: all 5 steps were dense: no plan: it could not be made (OutOfMemoryError"
    )
    assert "calibrate is off" not in found.text() and "no plan" in found.text()


def test_a_plan_found_and_one_moved_from_another_size(tmp_path):
    store = PlanStore([], tmp_path)
    run(store=store)
    found = run(store=store)
    assert "found in models/paro, made for this model and size" in found.text() and "of what step" not in found.text()
    moved = run(plan=found.plan, layouts=[SMALLER])
    assert "- the one that was given, moved here from a grid of 4 x 8 x 10\n" in moved.text()
    assert "given plan" not in moved.text() and moved.verdict().startswith("3 of 5 steps sparse")
    assert "the plan's blocks hold" in found.text() and "the plan's blocks hold" not in moved.text()


def test_fallback_in_every_layer(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(evaluation_module, "run_kernel", broken)
    found = check(
        run(),
        "No gain: all 5 steps were dense: RuntimeError: no such kernel; see the console, and report it",
    )
    assert "(double block 0, block 1, attention 2)" in found


def test_two_grids_in_a_run():
    found = run(layouts=[LAYOUT, SMALLER])
    assert (
        "another size in this run: 3 + 4x8x8 + 2 tokens" in found.text() and "of the largest size kept" in found.text()
    )
    assert "another size" not in run().text()


def test_a_run_that_met_nothing():
    session = Session(Policy(IDENTITY, recipe_for("wan"), Settings()), sigmas=SIGMAS)
    found = check(
        session.finish(),
        f"Not used: {reasons.NO_CALL}; another node may have changed the model, or it skipped every step",
    )
    assert "no size that PARO could read" in found


def test_a_calibrating_run_claims_nothing():
    calibrator = Calibrator(IDENTITY, mask_options(Settings(), recipe_for("wan")))
    check(run(calibrator=calibrator), "Calibration: 5 steps watched or dense, none is meant to be faster")


def test_steps_that_were_left_out_are_not_counted(sparse):
    session_sigmas = [1 - step / 10 for step in range(11)]
    policy = Policy(IDENTITY, recipe_for("wan"), Settings(dense_steps=1))
    session = Session(policy, sigmas=session_sigmas)
    evaluation = session.begin(layout=LAYOUT, sigma=1.0)
    q = torch.randn(1, 4, LAYOUT.length, 32)
    evaluation.attend(SITES[0], q, q, q, dense=lambda: q, blocks=2)
    session.log.note("double.0.0 has no plan of its own")
    for _ in range(9):
        session.decline("LTX: spatio-temporal guidance skips blocks in this evaluation")
    found = session.finish()
    # Not "the only step was dense": nine others were another's.
    said = found.verdict()
    assert said.startswith("No gain: PARO saw 1 of 10 steps, none sparse: LTX: spatio-temporal guidance ")
    assert said.endswith("; nothing to do, or do without this guidance") and len(said) <= LINE + 10
    assert found.text().endswith("\n- double block 0 has no plan of its own")
    assert found.facts.scheduled is False and "0 sparse and 1 dense step; of 10 planned" in found.text()


def test_one_line_holds_a_long_reason_cut_and_the_text_all_of_it():
    long = f"the token layout could not be read (TypeError: {'x' * 150})"
    said = not_used(long)
    assert len(said) <= LINE and "…" in said and said.endswith(hint_of(long))
    found = replace(run(layouts=[TINY]), passed=[(long, 1)])
    assert found.verdict() == said and "x" * 150 in found.text()


def test_off_and_stopped():
    assert not_used(OFF) == "Not used: PARO is switched off; switch enabled on in PARO Patch Model"
    assert len(not_used(NOT_ON_IT)) <= LINE and "put PARO Patch Model before the sampler" in not_used(NOT_ON_IT)
    assert stopped(2, 20).startswith("Not finished: the sampling was stopped in step 3 of 20;")
    assert "before its first step" in stopped(-1, 20)


def test_programs_get_what_they_got(sparse):
    expected = """family tokens grid prefix suffix steps dense_steps sites sites_sparse sites_dense_blocks sites_rotated
    sites_routed attention_error density densities mass_kept precision backend device plan_source
    orders_histogram calibration_seconds tail_seconds step_seconds calls fallbacks passed notes why_dense
    expected_gain"""
    assert list(sparse.as_dict()) == expected.split()


def test_layers_are_named_in_words():
    assert layer_words("double.0.0") == "double block 0" and layer_words("block.7.0") == "block 7"
    assert (
        layer_words("vace.3.1") == "vace block 3, attention 2" and layer_words("dense attention") == "dense attention"
    )


def test_the_first_step_is_no_measure_where_there_are_others():
    clock, times = StepClock(), {"dense": [(0, 9.0), (1, 2.0), (2, 2.0)]}
    clock.compared = times
    from comfyui_paro.paro_runtime.report.facts import _timing

    assert _timing("dense", times["dense"]) == Timing(2.0, 2) and _timing("dense", [(0, 9.0)]) == Timing(9.0, 1, True)


def test_only_steps_that_were_what_they_were_meant_to_be_are_compared():
    clock = StepClock()
    for step, (kind, calls) in enumerate([("dense", 0), ("calibrating", 0), ("sparse", 0), ("sparse", 0), ("", 2)]):
        clock.next(step, kind, calls)
    assert [step for step, _ in clock.compared["dense"]] == [0] and [s for s, _ in clock.compared["sparse"]] == [3]
    assert clock.sparse == [3] and (clock.happened, clock.dense) == (4, 3)


def test_the_picture_speaks_the_same_words(sparse, monkeypatch):
    from PIL import ImageDraw

    said, draw = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, text, *more: (said.append(text), draw(self, at, text, *more))
    )
    plan_picture(sparse.plan)
    kept, (first, _, last) = share(sparse.density), map(share, sparse.densities)
    assert any(f"{kept} of blocks kept ({first} to {last})" in text for text in said)
    assert "double block 0" in said and not any("density" in text or "attention kept" in text for text in said)
