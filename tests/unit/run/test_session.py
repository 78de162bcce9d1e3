"""One run: dense steps, calibration on the way, plans found again, fallbacks, and what the report says."""

import logging
import threading
from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.attention.block_list_layout import held_bytes
from comfyui_paro.kernels.core.dispatch import resolve
from comfyui_paro.kernels.core.layout import TokenLayout, geometry_of
from comfyui_paro.kernels.core.precision import PRECISIONS
from comfyui_paro.kernels.core.scratch import ScratchOutOfMemory
from comfyui_paro.paro_runtime.attention import patterns as patterns_module
from comfyui_paro.paro_runtime.attention.patterns import PatternCache, with_bias
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator, Method
from comfyui_paro.paro_runtime.config.recipes import mask_options, recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan import store as plan_store_module
from comfyui_paro.paro_runtime.plan.file import load_plan
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, PlanError, Site
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.run import evaluation as evaluation_module
from comfyui_paro.paro_runtime.run.attempt import Attempt
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session
from torch.nn.functional import scaled_dot_product_attention as sdpa

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
LAYOUT = TokenLayout(3, (4, 8, 10), 2)
IDENTITY = ModelIdentity("wan", "a" * 16, "b" * 16)
SITES = [Site("double", i) for i in range(3)]


DEFAULT = Settings(density=0.3, dense_steps=2)


def policy(settings=None, store=None, plan=None, identity=IDENTITY):
    return Policy(identity, recipe_for("wan"), settings or DEFAULT, plan, store, remember=True)


def tensors(site, step, layout=LAYOUT, heads=4, dim=32, kv_heads=None):
    """The same q, k, v for the same site and step."""
    generator = torch.Generator().manual_seed(100 * site.block_index + step)
    shape = (1, heads, layout.length, dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    if kv_heads:
        k, v = k[:, :kv_heads], v[:, :kv_heads]
    return q, k, v


def sample(session, *, layout=LAYOUT, sigmas=SIGMAS, kv_heads=None, change=None, blocks=3):
    """Run every step and site; returns {(step, site): (out, dense)}."""
    results = {}
    for step, sigma in enumerate(sigmas[:-1]):
        evaluation = session.begin(layout=layout, sigma=sigma)
        for site in SITES:
            q, k, v = tensors(site, step, layout, kv_heads=kv_heads)
            if change:
                q, k, v = change(step, site, q, k, v)
            group = q.shape[1] // k.shape[1]
            dense = sdpa(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
            out = evaluation.attend(site, q, k, v, dense=lambda d=dense: d, blocks=blocks)
            results[step, site] = (out, dense)
        evaluation.end()
    return results


def was_dense(pair):
    return torch.equal(*pair)


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


def test_a_second_run_finds_its_plan_and_calibrates_nothing(tmp_path):
    store = PlanStore([], tmp_path)
    first = Session(policy(store=store), sigmas=SIGMAS)
    before = sample(first)
    first.finish()
    second = Session(policy(store=store), sigmas=SIGMAS)
    after = sample(second)
    report = second.finish()
    assert report.plan_source == "plan found" and report.calibration_seconds == 0
    assert all(torch.equal(before[key][0], after[key][0]) for key in before)


def test_a_plan_made_of_pure_noise_serves_runs_that_see_no_more(tmp_path):
    store, made = PlanStore([], tmp_path), []
    for dense_steps, source, criterion in (
        (1, "calibrated on the way", "mass"),
        (1, "plan found", "mass"),
        (2, "calibrated on the way", "error"),
        (3, "plan found", "error"),
        (1, "plan found", "error"),
    ):
        session = Session(policy(Settings(dense_steps=dense_steps), store), sigmas=SIGMAS)
        sample(session)
        report = session.finish()
        assert (report.plan_source, report.plan.made["criterion"]) == (source, criterion), dense_steps
        made.append(report.plan)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    # Where calibrating is forbidden, or a method is forced, the plan that there is serves.
    store = PlanStore([], tmp_path)
    store.save(made[0])
    for more in ({"settings": Settings(dense_steps=3, calibrate=False)}, {"method": Method(criterion="mass")}):
        settings = more.pop("settings", Settings(dense_steps=3))
        session = Session(policy(settings, store), sigmas=SIGMAS, **more)
        sample(session)
        assert session.finish().plan_source == "plan found"


@pytest.mark.parametrize(
    "other",
    [
        {"layout": TokenLayout(3, (4, 10, 8), 2)},
        {"settings": Settings(dense_steps=2, preset="fast")},
        {"settings": Settings(dense_steps=2, mass_target=0.5)},
        {"identity": ModelIdentity("wan", "c" * 16, "b" * 16)},
    ],
    ids=["grid", "density", "target", "model"],
)
def test_another_grid_density_target_or_model_calibrates_anew(tmp_path, other):
    store = PlanStore([], tmp_path)
    sample(first := Session(policy(store=store), sigmas=SIGMAS))
    first.finish()
    layout = other.pop("layout", LAYOUT)
    session = Session(policy(store=store, **other), sigmas=SIGMAS)
    sample(session, layout=layout)
    assert session.finish().plan_source == "calibrated on the way"
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("target, said", [(0.5, False), (0.999, True)])
def test_a_mass_target_out_of_reach_is_told(target, said):
    settings = Settings(preset="custom", density=0.6, dense_steps=1, mass_target=target)
    sample(session := Session(policy(settings), sigmas=SIGMAS))
    report = session.finish()
    assert report.density <= 0.62 and (report.mass_kept < target) == said
    assert ("were wanted" in report.text()) == said


def test_a_plan_serves_another_text_length():
    session = Session(policy(), sigmas=SIGMAS)
    sample(session)
    plan = session.finish().plan
    longer = Session(policy(Settings(dense_steps=0), plan=plan), sigmas=SIGMAS)
    results = sample(longer, layout=TokenLayout(40, LAYOUT.grid, 0))
    assert longer.finish().calls == {"sparse": 15}
    assert all(torch.isfinite(out).all() for out, _ in results.values())


def test_without_dense_steps_the_first_step_calibrates_and_is_sparse():
    session = Session(policy(Settings(dense_steps=0)), sigmas=SIGMAS)
    results = sample(session)
    assert not any(map(was_dense, results.values()))
    report = session.finish()
    assert (report.sites_sparse, report.plan_source, report.plan.made["step"]) == (3, "calibrated on the way", 0)


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


def test_a_result_that_is_not_finite_is_redone_dense_and_the_site_stays_dense(caplog):
    def overflow(step, site, q, k, v):
        v = v.clone()
        if step == 3 and site == SITES[1]:
            v[..., 5, :] = torch.nan
        return q, k, v

    session = Session(policy(), sigmas=SIGMAS)
    with caplog.at_level(logging.WARNING, "paro"):
        results = sample(session, change=overflow)
    assert not was_dense(results[2, SITES[1]])
    assert was_dense(results[4, SITES[1]]) and not was_dense(results[4, SITES[2]])
    report = session.finish()
    assert report.fallbacks == [("double.1.0: the result is not finite", 2)]
    assert "not finite" in report.status()
    assert sum("not finite" in r.message for r in caplog.records) == 1  # said once, counted twice


def test_every_call_has_a_flag_of_its_own():
    attempt = Attempt(Session(policy(), sigmas=SIGMAS))
    flags = [attempt.flag(torch.device("cpu")).on_device for _ in range(150)]
    assert len({f.data_ptr() for f in flags}) == 150 and not any(f.any() for f in flags)
    assert all(f.data_ptr() % 16 == 0 for f in flags)  # or Triton would compile a second kernel


def attempt_with(session, *raised):
    """An attempt that saw a result of each of some sites: (site, whether its flag is up)."""
    attempt = Attempt(session, can_redo=True)
    for site, bad in raised:
        flag = attempt.flag(torch.device("cpu"))
        flag.on_device[0] = bad
        assert attempt.finite(site, flag)  # nobody looks now
    return attempt


def test_results_looked_at_in_the_end_turn_the_first_site_at_fault_dense():
    """The calls of an evaluation are judged together; what is not finite spreads, so the first is at fault."""
    sample(session := Session(policy(), sigmas=SIGMAS))
    attempt = attempt_with(session, *zip(SITES, (0, 1, 1), strict=True))
    assert attempt.end(0) and list(session.off_sites) == [SITES[1]]
    assert not attempt.end(1)  # nothing is left to look at
    assert attempt_with(session, (SITES[0], 1), (SITES[2], 1)).end(1) and set(session.off_sites) == set(SITES)
    assert not attempt_with(session, (SITES[0], 0)).end(0)
    assert attempt_with(session, (None, 1)).end(0) and session.dense_off


def test_trouble_in_the_kernel_falls_back_and_strict_raises(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(evaluation_module, "run_kernel", broken)
    session = Session(policy(), sigmas=SIGMAS)
    assert all(was_dense(pair) for pair in sample(session).values())
    report = session.finish()
    assert dict(report.fallbacks)["double.0.0: RuntimeError: no such kernel"] == 3
    with pytest.raises(RuntimeError, match="no such kernel"):
        sample(Session(policy(Settings(dense_steps=2, strict=True)), sigmas=SIGMAS))


def test_a_site_that_the_plan_lacks_falls_back_and_strict_raises():
    made = Session(policy(Settings(density=0.3, dense_steps=2)), sigmas=SIGMAS)
    sample(made)
    (grid,) = made.grids()
    lacking = replace(grid.plan, sites={site: entry for site, entry in grid.plan.sites.items() if site != SITES[1]})
    session = Session(policy(Settings(density=0.3, dense_steps=2), plan=lacking), sigmas=SIGMAS)
    results = sample(session)
    assert {site for (_, site), result in results.items() if not was_dense(result)} == set(SITES) - {SITES[1]}
    assert session.finish().fallbacks == [(f"{SITES[1].name} is not in the plan", len(SIGMAS) - 3)]
    with pytest.raises(RuntimeError, match=r"^strict: is not in the plan; make the plan anew"):
        sample(Session(policy(Settings(density=0.3, dense_steps=2, strict=True), plan=lacking), sigmas=SIGMAS))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ScratchOutOfMemory("too small")])
def test_out_of_memory_is_answered_by_the_host(monkeypatch, error):
    def scarce(*arguments, **options):
        raise error

    monkeypatch.setattr(evaluation_module, "run_kernel", scarce)
    session = Session(policy(), sigmas=SIGMAS)
    assert all(was_dense(pair) for pair in sample(session).values())
    assert type(error).__name__ in session.finish().fallbacks[0][0]


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


def test_the_bias_measured_in_the_run_replaces_the_plans():
    sample(session := Session(policy(), sigmas=SIGMAS))
    plan = session.finish().plan
    cache = PatternCache()
    arguments = (SITES[0], plan, 1, LAYOUT, 4, torch.device("cpu"))
    measured = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(with_bias(cache.get(*arguments), measured).tail_bias, measured)
    assert torch.equal(cache.get(*arguments).tail_bias, plan.sites[SITES[0]].tail_bias[1])
    assert with_bias(cache.get(*arguments), measured).kept_words is cache.get(*arguments).kept_words and len(cache) == 1


def test_a_plan_that_cannot_be_made_leaves_the_run_dense(monkeypatch):
    def fail(self, made):
        raise MemoryError("no room for the masks")

    monkeypatch.setattr(Calibrator, "plan", fail)
    session = Session(policy(), sigmas=SIGMAS)
    assert all(was_dense(pair) for pair in sample(session).values())
    assert session.finish().notes == ["calibration: no plan could be made (MemoryError: no room for the masks)"]
    with pytest.raises(MemoryError):
        sample(Session(policy(Settings(dense_steps=2, strict=True)), sigmas=SIGMAS))


def test_a_plan_that_cannot_be_saved_still_serves_the_run(tmp_path):
    (tmp_path / "file").write_text("")  # a file stands where the folder should be
    session = Session(policy(store=PlanStore([], tmp_path / "file")), sigmas=SIGMAS)
    sample(session)
    report = session.finish()
    assert report.sites_sparse == 3 and report.notes[0].startswith("plan: could not be saved")


def test_a_gpu_that_triton_cannot_serve_is_left_to_the_host():
    """The reference on a GPU would be slower than dense attention: it runs there only when asked for."""
    arguments = (torch.float16, 128, PRECISIONS["int8"])
    assert "mps" in resolve("auto", torch.device("mps"), *arguments).reason
    session = Session(policy(), sigmas=SIGMAS)
    assert "mps" in session._find_unsuitable(4096, torch.device("mps"), *arguments[:2])
    assert resolve("reference", torch.device("mps"), *arguments) == ("reference", {})
    assert resolve("auto", torch.device("cpu"), *arguments) == ("reference", {})


def test_calibration_can_be_forbidden():
    session = Session(policy(Settings(dense_steps=1, calibrate=False)), sigmas=SIGMAS)
    assert all(was_dense(pair) for pair in sample(session).values())
    assert ("no plan and calibration is off", 15) in session.finish().fallbacks


def test_a_plan_for_other_weights_is_used_with_a_note_and_for_another_grid_is_not():
    sample(first := Session(policy(), sigmas=SIGMAS))
    plan = first.finish().plan
    tuned = ModelIdentity("wan", "a" * 16, "f" * 16)
    session = Session(policy(plan=plan, identity=tuned), sigmas=SIGMAS)
    sample(session)
    report = session.finish()
    assert report.plan_source == "given plan" and "other weights" in report.notes[0]


def test_a_damaged_plan_in_the_folder_is_named_and_replaced(tmp_path):
    store = PlanStore([], tmp_path)
    sample(first := Session(policy(store=store), sigmas=SIGMAS))
    first.finish()
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    session = Session(policy(store=store), sigmas=SIGMAS)
    sample(session)
    report = session.finish()
    assert report.plan_source == "calibrated on the way"
    assert "calibrating anew" in report.notes[0] and path.name in report.notes[0]
    load_plan(path)


def test_a_plan_damaged_behind_its_header_is_replaced_where_sparse_steps_would_begin(tmp_path):
    """What the header says suits, so the dense steps see nothing; the step that needs the plan calibrates."""
    store = PlanStore([], tmp_path)
    sample(first := Session(policy(store=store), sigmas=SIGMAS))
    first.finish()
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    session = Session(policy(store=store), sigmas=SIGMAS)
    results = sample(session)
    assert {step for (step, _), pair in results.items() if was_dense(pair)} == {0, 1}
    report = session.finish()
    assert report.plan_source == "calibrated on the way" and report.plan.made["step"] == 2
    assert len(report.notes) == 1 and path.name in report.notes[0] and "calibrating anew" in report.notes[0]
    assert report.fallbacks == [] and report.sites_sparse == 3
    assert load_plan(path).made["step"] == 2


@pytest.mark.parametrize("ends_early", [False, True])
def test_a_plan_is_read_beside_the_dense_steps(tmp_path, monkeypatch, ends_early):
    store = PlanStore([], tmp_path)
    sample(first := Session(policy(store=store), sigmas=SIGMAS))
    first.finish()
    read, go_on = plan_store_module.load_plan, threading.Event()

    def slow(path):
        assert go_on.wait(60)
        return read(path)

    monkeypatch.setattr(plan_store_module, "load_plan", slow)
    session = Session(policy(store=store), sigmas=SIGMAS)
    for step, sigma in enumerate(SIGMAS[:2]):
        evaluation = session.begin(layout=LAYOUT, sigma=sigma)
        for site in SITES:
            q, k, v = tensors(site, step)
            evaluation.attend(site, q, k, v, dense=lambda v=v: v, blocks=3)
        evaluation.end()
    go_on.set()
    if ends_early:
        report = session.finish()
        assert sorted(report.plan.sites) == SITES and report.calls == {"sparse": 0, "dense step": 6}
    else:
        sample(session)
        assert session.finish().calls["sparse"] == 9
    assert session.finish().plan_source == "plan found" and not session.log.notes


@pytest.mark.parametrize("strict", [False, True])
def test_a_plan_that_cannot_be_read_for_want_of_memory_is_told(tmp_path, monkeypatch, strict):
    store = PlanStore([], tmp_path)
    sample(first := Session(policy(store=store), sigmas=SIGMAS))
    first.finish()

    def full(path):
        raise MemoryError("no room")

    monkeypatch.setattr(plan_store_module, "load_plan", full)
    session = Session(policy(Settings(density=0.3, dense_steps=2, strict=strict), store), sigmas=SIGMAS)
    if strict:
        with pytest.raises(MemoryError):
            sample(session)
        return
    sample(session)
    report = session.finish()
    assert report.notes == ["plan: could not be read (MemoryError: no room); calibrating anew"]
    assert report.plan_source == "calibrated on the way"


def test_whatever_keeps_a_plan_from_being_saved_is_told(tmp_path, monkeypatch):
    """It happens beside the run, where an exception would be lost."""

    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(plan_store_module, "save_plan", full)
    session = Session(policy(store=PlanStore([], tmp_path)), sigmas=SIGMAS)
    sample(session)
    assert session.finish().notes == ["plan: could not be saved (no room)"]


def test_plans_are_made_saved_and_found_under_inference_mode(tmp_path):
    """As the host runs everything; threads do not inherit it."""
    store, sources = PlanStore([], tmp_path), []
    with torch.inference_mode():
        for _ in range(2):
            sample(session := Session(policy(Settings(dense_steps=2, strict=True), store), sigmas=SIGMAS))
            report = session.finish()
            assert not report.notes and report.sites_sparse == 3
            sources.append(report.plan_source)
    assert sources == ["calibrated on the way", "plan found"]


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


def test_a_calibrating_run_keeps_blocks_by_error_whatever_steps_it_sees():
    """What is right for one video's first step was not measured for many; the offline default stays."""
    calibrator = Calibrator(IDENTITY, mask_options(Settings(), recipe_for("wan")))
    sample(Session(policy(), sigmas=SIGMAS, calibrator=calibrator, calibrate_steps=frozenset({0}), highest_noise=1.0))
    assert calibrator.plan({}).made["criterion"] == "error"


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
