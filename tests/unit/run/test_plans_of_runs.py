"""Plans of one run and the next: found again, made anew, and what stands in their way."""

import threading

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator, Method
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan import store as plan_store_module
from comfyui_paro.paro_runtime.plan.file import load_plan
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.run.session import Session

from .cases import LAYOUT, SIGMAS, SITES, policy, sample, tensors, was_dense


@pytest.fixture
def store(tmp_path) -> PlanStore:
    """A folder with the plan of one run."""
    store = PlanStore([], tmp_path)
    sample(first := Session(policy(store=store), sigmas=SIGMAS))
    first.finish()
    return store


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
def test_another_grid_density_target_or_model_calibrates_anew(store, tmp_path, other):
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


def test_whatever_keeps_a_plan_from_being_saved_is_told(tmp_path, monkeypatch):
    """It happens beside the run, where an exception would be lost."""

    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(plan_store_module, "save_plan", full)
    session = Session(policy(store=PlanStore([], tmp_path)), sigmas=SIGMAS)
    sample(session)
    assert session.finish().notes == ["plan: could not be saved (no room)"]


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


def test_a_damaged_plan_in_the_folder_is_named_and_replaced(store, tmp_path):
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:200])
    session = Session(policy(store=store), sigmas=SIGMAS)
    sample(session)
    report = session.finish()
    assert report.plan_source == "calibrated on the way"
    assert "calibrating anew" in report.notes[0] and path.name in report.notes[0]
    load_plan(path)


def test_a_plan_damaged_behind_its_header_is_replaced_where_sparse_steps_would_begin(store, tmp_path):
    """What the header says suits, so the dense steps see nothing; the step that needs the plan calibrates."""
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
def test_a_plan_is_read_beside_the_dense_steps(store, monkeypatch, ends_early):
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
def test_a_plan_that_cannot_be_read_for_want_of_memory_is_told(store, monkeypatch, strict):

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
