"""PARO with what else users put on a model, in the real host; docs/composition.md is written from the same list."""

import threading

import pytest
import torch
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator
from comfyui_paro.paro_runtime.run.evaluation import Evaluation
from comfyui_paro.tests.host.cases import relative_error
from comfyui_paro.tests.host.compositions import DENSE, ORDERS, SPARSE
from comfyui_paro.tests.host.compositions_all import COMPOSITIONS

pytestmark = pytest.mark.host_on_cpu
pytest.importorskip("av", reason="NO av: the host's own nodes cannot be imported")

EXACT = {"preset": "custom", "density": 1.0, "precision": "16bit", "tail": "off", "dense_steps": 0}
SETTINGS = {"preset": "custom", "density": 0.4, "dense_steps": 1}
# With every block kept it is the same sum in another order, in float32: 2e-6 at most in all compositions.
ROUNDING = 1e-5
# Blocks dropped in random weights: 0.03 at most.
SPARSE_ERROR = 0.1
# Compositions in which PARO must do what it does alone.
NEUTRAL = [(c, order) for c in COMPOSITIONS if c.node and c.expected == SPARSE and not c.changes for order in ORDERS]
OTHERS = [c for c in COMPOSITIONS if c.node or c.sampled]
OTHERS = [(c, order) for c in OTHERS for order in (ORDERS if c.node else ("",)) if (c, order) not in NEUTRAL]


@pytest.fixture
def bed(comfy, wan_file, flux_file):
    """Makes what a composition is made on."""
    from comfyui_paro.tests.host.composition_bed import Bed

    def make(case):
        return Bed(case.model, {"wan": wan_file, "flux": flux_file}, case.batch)

    return make


def run(comfy, bed, case, order, settings):
    """The composition's result, and the reports of all models that were patched in it, without repetition."""
    patched = []

    def paro(model):
        patched.append(model if settings is None else comfy.patched(model, **settings))
        return patched[-1]

    torch.manual_seed(0)
    torch.compiler.reset()
    bed.seen.clear()
    if case.sampled:
        out = case.sampled(bed, paro)
    else:
        model = case.node(bed, paro(bed.model)) if order == ORDERS[0] else paro(case.node(bed, bed.model))
        out = bed.sample(model, steps=case.steps)
    assert all("paro" not in model.model_options["transformer_options"] for model in patched)
    return out, [comfy.report(model, out) for model in patched]


def names(cases):
    return [f"{case.key}, {order}".rstrip(", ") for case, order in cases]


@pytest.mark.parametrize("case, order", NEUTRAL, ids=names(NEUTRAL))
def test_neutral_composition(comfy, bed, case, order):
    """To the bit what PARO gives without the other node, whose own functions run where PARO does not."""
    bed = bed(case)
    alone, model = bed.sample(bed.model), comfy.patched(bed.model, **SETTINGS)
    expected = bed.sample(model)
    report = comfy.report(model)
    assert (report.sites_sparse, report.passed) == (bed.sites, []) and not torch.equal(expected, alone)
    out, (its,) = run(comfy, bed, case, order, SETTINGS)
    assert bed.seen or "override" not in case.name
    assert torch.equal(out, expected)
    assert (its.calls, its.sites_sparse, its.passed) == (report.calls, bed.sites, []) and not its.fallbacks + its.notes
    if order == ORDERS[0]:
        ran = bool(bed.seen)
        assert torch.equal(run(comfy, bed, case, order, None)[0], alone) and bool(bed.seen) == ran
    torch.compiler.reset()
    assert torch.equal(bed.sample(bed.model), alone)


@pytest.mark.parametrize("case, order", OTHERS, ids=names(OTHERS))
def test_composition(comfy, tiny, bed, case, order):
    """Right with every block kept, sparse where it is said to be, the same every time, and gone afterwards."""
    bed = bed(case)
    alone = bed.sample(bed.model, steps=case.steps)
    dense, _ = run(comfy, bed, case, order, None)
    ran = len(bed.seen)
    assert (dense.shape != alone.shape or relative_error(dense, alone) > 1e-4) == case.changes
    exact, reports = run(comfy, bed, case, order, EXACT)
    assert relative_error(exact, dense) < ROUNDING
    whole = sum(report.calls["sparse"] for report in reports)
    out, reports = run(comfy, bed, case, order, SETTINGS)
    assert bool(bed.seen) == bool(ran)  # other nodes' own functions still run where PARO does not
    for report in reports:
        assert not report.fallbacks and not report.notes, report.text()
        assert all(case.passed and reason.startswith(case.passed) for reason, _ in report.passed), report.passed
        assert (report.sites_sparse == bed.sites) == (case.expected != DENSE), report.text()
    if case.expected == DENSE:
        assert torch.equal(out, dense) and all(report.passed for report in reports) and not whole
    else:
        calls = [sum(report.calls.values()) for report in reports]
        assert sum(calls) == whole
        assert case.sampled or (whole < case.steps * bed.sites) == case.skips
        assert 20 * relative_error(exact, dense) < relative_error(out, dense) < SPARSE_ERROR
    assert torch.equal(run(comfy, bed, case, order, SETTINGS)[0], out)
    assert torch.equal(bed.sample(bed.model, steps=case.steps), alone)


def test_every_sampler(comfy, wan):
    """All that the host offers, those included that choose their steps by what they get."""
    import comfy as host

    empty = comfy.latent((3, 6, 8))
    for sampler in host.samplers.KSampler.SAMPLERS:
        outs = []
        for model in (wan, comfy.patched(wan, **EXACT), comfy.patched(wan, **SETTINGS)):
            torch.manual_seed(0)
            given = (
                comfy.comfy.sample.prepare_noise(empty, 0),
                3,
                2.0,
                sampler,
                "simple",
                comfy.text(1),
                comfy.text(2),
            )
            outs.append(host.sample.sample(model, *given, empty, disable_pbar=True, seed=0))
        report = comfy.report(model, outs[2])
        assert relative_error(outs[1], outs[0]) < 1e-3, sampler
        assert torch.isfinite(outs[2]).all() and report.sites_sparse == comfy.LAYERS, sampler
        assert not report.passed and not report.fallbacks, (sampler, report.text())


# What PARO is doing, and in which step of the run that comes first.
MOMENTS = {
    "dense": (Evaluation, "_dense", 0),
    "observing": (Calibrator, "observe", 1),
    "planning": (Calibrator, "plan", 2),
    "sparse": (Evaluation, "_sparse", 2),
}
INTERRUPTED = {"preset": "custom", "density": 0.4, "dense_steps": 2}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupt(comfy, wan, store, monkeypatch, moment):
    """The host's own, while PARO is at work: it ends the run there, keeps no plan, and changes no later run."""
    import comfy as host

    alone = comfy.sample(wan, (5, 7, 9), steps=5)
    expected = comfy.sample(comfy.patched(wan, **INTERRUPTED), (5, 7, 9), steps=5)
    where, name, stopped = MOMENTS[moment]
    real, steps = getattr(where, name), []

    def interrupting(self, *args, **kwargs):
        host.model_management.interrupt_current_processing(True)
        return real(self, *args, **kwargs)

    model = comfy.patched(wan, store=store, **INTERRUPTED)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, interrupting)
        with pytest.raises(host.model_management.InterruptProcessingException):
            comfy.sample(model, (5, 7, 9), steps=5, callback=lambda step, *_: steps.append(step))
    assert "paro" not in model.model_options["transformer_options"]
    for thread in threading.enumerate():
        if thread.name == "paro-save":  # what was planned before the end
            thread.join()
    assert len(steps) == stopped and f"stopped in step {stopped + 1} of 5" in comfy.report(model)
    assert len(store.names()) == (moment in ("planning", "sparse"))
    assert torch.equal(comfy.sample(comfy.patched(wan, **INTERRUPTED), (5, 7, 9), steps=5), expected)
    assert torch.equal(comfy.sample(wan, (5, 7, 9), steps=5), alone)


def test_settings_and_threads_alternating(comfy, wan, wan_file):
    """Two patched clones with other settings, one after the other and two models at a time: nothing crosses."""
    others = [comfy.load(wan_file), comfy.load(wan_file)]
    kinds = [{**SETTINGS, "density": density} for density in (0.3, 0.6)]
    expected = [comfy.sample(comfy.patched(wan, **kind), (5, 7, 9)) for kind in kinds]
    models = [comfy.patched(wan, **kind) for kind in kinds]
    for _ in range(2):
        for model, out in zip(models, expected, strict=True):
            assert torch.equal(comfy.sample(model, (5, 7, 9)), out)
    outs = [None, None]

    def sample(number):
        outs[number] = comfy.sample(comfy.patched(others[number], **kinds[number]), (5, 7, 9))

    threads = [threading.Thread(target=sample, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, outs, expected)) and not torch.equal(*expected)
