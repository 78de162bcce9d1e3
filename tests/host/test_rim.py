"""Whatever goes wrong in PARO's own code or in what other nodes hand it, the host's attention answers and the run ends:
with a reason in its report, and an error only with `strict`."""

import json
import logging
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.host import attention_call as calls_module
from comfyui_paro.paro_runtime.host import override, patching, standing, wrappers
from comfyui_paro.paro_runtime.host.claims import Claim, HostEvaluation, Stream
from comfyui_paro.paro_runtime.host.override import SLOT
from comfyui_paro.paro_runtime.host.wrappers import HostRun
from comfyui_paro.paro_runtime.plan.plan import Site
from comfyui_paro.paro_runtime.report.reasons import SKIPPED
from comfyui_paro.paro_runtime.run.evaluation import Evaluation
from comfyui_paro.paro_runtime.run.session import Session

pytestmark = pytest.mark.host_on_cpu

GRID = (5, 7, 9)
SPARSE = {"preset": "custom", "density": 0.4, "dense_steps": 1}


class OwnBugError(Exception):
    """No kind that anything in PARO or the host expects."""


def raising(*args, **kwargs):
    raise OwnBugError("an index out of range")


class Unmade(wrappers.Lifecycle):
    """One that cannot be made."""

    __init__ = raising


def of_other_shape(self, site, q, *rest, **options):
    return q[:, :, 1:]


def of_other_dtype(self, site, q, *rest, **options):
    return q.double()


def nothing(self, *args, **kwargs):
    return None


FAULTS = {
    "run start": (Session, "__init__", raising, None),
    "evaluation begin": (Session, "begin", raising, "the token layout could not be read (OwnBugError"),
    "claim": (HostEvaluation, "claim", raising, "a call could not be told apart: OwnBugError: an index"),
    "attend": (Evaluation, "attend", raising, "double.0.0: OwnBugError: an index out of range"),
    "site's suitability": (Session, "_find_unsuitable", raising, "double.0.0: OwnBugError"),
    "shape": (Evaluation, "attend", of_other_shape, "double.0.0: RuntimeError: the result is ["),
    "dtype": (Evaluation, "attend", of_other_dtype, "torch.float64 on cpu, expected ["),
    "no result": (Evaluation, "attend", nothing, "double.0.0: RuntimeError: the result is NoneType, not a tensor"),
    "claims set aside": (HostEvaluation, "without_claims", raising, "double.0.0: OwnBugError"),
    "evaluation end": (HostEvaluation, "end", raising, "the end of an evaluation: OwnBugError"),
    "report": (Session, "finish", raising, None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_no_generation(comfy, wan, monkeypatch, caplog, name):
    where, what, fault, reason = FAULTS[name]
    dense = comfy.sample(wan, GRID, steps=3)
    monkeypatch.setattr(where, what, fault)
    model = comfy.patched(wan, strict=False, **SPARSE)
    out = comfy.sample(model, GRID, steps=3)
    assert torch.isfinite(out).all()
    if name not in ("claims set aside", "evaluation end", "report"):  # sparse steps are as they were
        assert torch.equal(out, dense)
    report = comfy.report(model)
    if reason is None:
        assert isinstance(report, str)
    else:
        told = [text for text, _ in (*report.fallbacks, *report.passed)]
        assert any(reason in text for text in told), told
    assert any("PARO" in record.message or "host's attention" in record.message for record in caplog.records)
    with pytest.raises((OwnBugError, RuntimeError)):
        comfy.sample(comfy.patched(wan, strict=True, **SPARSE), GRID, steps=3)


def test_a_traceback_is_logged_once_in_a_run(comfy, wan, monkeypatch, caplog):
    monkeypatch.setattr(Evaluation, "attend", raising)
    comfy.sample(comfy.patched(wan, strict=False, **SPARSE), GRID, steps=3)
    with_traceback = [record for record in caplog.records if record.exc_info and record.levelno == logging.ERROR]
    assert len(with_traceback) == comfy.LAYERS


def test_an_error_of_the_hosts_own_attention_is_the_hosts(comfy, wan):
    calls = []

    def theirs(func, *args, **kwargs):
        calls.append(1)
        raise OwnBugError("out of cheese")

    model = comfy.patched(wan, strict=False, **SPARSE)
    model.model_options["transformer_options"][SLOT].paro_previous = theirs
    other = wan.clone()
    other.model_options["transformer_options"] = {SLOT: theirs}
    with pytest.raises(OwnBugError):
        comfy.sample(comfy.patched(other, strict=False, **SPARSE), GRID, steps=3)
    assert len(calls) == 1


def evaluation_of(attend, trouble):
    """What the override asks of a running evaluation, with `attend` in the runtime's place."""
    stream = Stream(SimpleNamespace(attend=attend), 0, None)
    return SimpleNamespace(stream_of=lambda call, claim: stream, without_claims=nullcontext, trouble=trouble)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_what_the_hosts_own_attention_gives_is_not_judged(kind):
    """Another attention may answer in another dtype, and models take it."""
    q = torch.randn(1, 2, 9, 8)
    call, calls = calls_module.read_call(q, q, q, 2, skip_reshape=True, skip_output_reshape=True), []

    def theirs():
        calls.append(1)
        return q.to(kind)

    claim = Claim(Site("it", 0), None, 0)
    ours = (evaluation_of(lambda *args, dense, **more: dense(), raising), call, claim)
    assert override._attend(ours, theirs, True).dtype == kind and len(calls) == 1
    ours = (evaluation_of(lambda *args, **more: q.to(kind), lambda *args: calls.append(2)), call, claim)
    out = override._attend(ours, theirs, True)
    assert out.dtype == kind and calls == [1, 2, 1]


def test_standing_first_next_to_the_model_costs_no_generation(comfy, wan, monkeypatch):
    """Where another node's wrapper stands behind PARO's."""
    from comfy.patcher_extension import WrappersMP

    def wrap(executor, *args, **kwargs):
        monkeypatch.setattr(standing, "stand_first", raising)
        try:
            return executor(*args, **kwargs)
        finally:
            monkeypatch.setattr(standing, "stand_first", stand_first)

    stand_first = standing.stand_first
    for strict in (False, True):
        model = comfy.patched(wan, strict=strict, **SPARSE)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "theirs", wrap)
        if strict:
            with pytest.raises(OwnBugError):
                comfy.sample(model, GRID, steps=2)
        else:
            assert torch.isfinite(comfy.sample(model, GRID, steps=2)).all()
            ((reason, count),) = comfy.report(model).fallbacks
            assert reason.startswith("standing before another attention: OwnBugError") and count == 2


def test_a_line_that_cannot_be_shown_costs_nothing(comfy, wan, caplog):
    """Neither a dense step nor the report."""
    from comfyui_paro.paro_runtime.host.patching import last_report, patch_model

    expected = comfy.sample(comfy.patched(wan, **SPARSE), GRID, steps=3)
    model = patch_model(wan, Settings(strict=False, **SPARSE), on_status=raising)
    assert torch.equal(comfy.sample(model, GRID, steps=3), expected)
    assert last_report(model).calls == {"sparse": 2 * comfy.LAYERS, "dense step": comfy.LAYERS}
    assert sum(record.exc_info is not None for record in caplog.records) == 1
    with pytest.raises(OwnBugError):
        comfy.sample(patch_model(wan, Settings(strict=True, **SPARSE), on_status=raising), GRID, steps=3)


def test_a_server_that_shows_nothing_costs_nothing(comfy, monkeypatch):
    from comfyui_paro.paro_runtime.host.status import status_line

    instance = SimpleNamespace(send_progress_text=raising)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    status_line("7")("a line")
    monkeypatch.delattr(instance, "send_progress_text")
    status_line("7")("a line")


@pytest.mark.parametrize("what", ["text", "as_dict", "picture", "PreviewImage"])
def test_a_report_that_cannot_be_shown_leaves_the_pictures_alone(comfy, wan, monkeypatch, what):
    from comfyui_paro.nodes import report as module
    from comfyui_paro.paro_runtime.report.report import Report

    model = comfy.patched(wan, **SPARSE)
    latent = {"samples": comfy.sample(model, GRID, steps=3)}
    hidden = SimpleNamespace(unique_id="7", prompt=None, extra_pnginfo=None)
    monkeypatch.setattr(module.PAROReport, "hidden", hidden, raising=False)
    monkeypatch.setattr(module.ui if what == "PreviewImage" else Report, what, raising)
    made = module.PAROReport.execute(model, latent)
    assert made.args[0] == "The report cannot be shown (OwnBugError: an index out of range)"
    assert json.loads(made.args[1]) == {"reason": made.args[0]} and made.ui["images"] == []


def test_an_evaluation_that_another_node_answers_says_so(comfy, wan):
    """As caches of steps do."""
    from comfy.patcher_extension import WrappersMP

    calls, last = [], []

    def cache(executor, *args, **kwargs):
        calls.append(1)
        last[:] = last if len(calls) == 3 else [executor(*args, **kwargs)]
        return last[0]

    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL):
        calls.clear()
        model = comfy.patched(wan, **SPARSE)
        model.add_wrapper_with_key(kind, "theirs", cache)
        comfy.sample(model, GRID, steps=4)
        assert comfy.report(model).passed == [(SKIPPED, 1)]
        assert comfy.report(model).calls == {"sparse": 2 * comfy.LAYERS, "dense step": comfy.LAYERS}


def test_what_the_hosts_own_attention_gives_goes_to_the_caller_as_it_is(caplog):
    """Also where it has no form that PARO knows."""
    q, calls, troubles = torch.randn(1, 9, 16), [], []
    call = calls_module.read_call(q, q, q, 2)

    def theirs():
        calls.append(1)
        return q[0, 0]

    given = evaluation_of(lambda *args, dense, **more: dense(), lambda *about: troubles.append(1))
    out = override._attend((given, call, Claim(Site("it", 0), None, 0)), theirs, True)
    assert torch.equal(out, q[0, 0]) and len(calls) == 2 and len(troubles) == 1


@pytest.mark.parametrize("options", [7, "text", [], torch.ones(2)])
def test_options_that_are_none_carry_no_run(options):
    q = torch.randn(1, 9, 16)
    made = override.make_override(None)
    assert (
        made(lambda *args, **kwargs: kwargs["transformer_options"], q, q, q, 2, transformer_options=options) is options
    )


@pytest.mark.parametrize("index", ["seven", (1, 2), None])
def test_a_block_number_that_is_none(comfy, wan, index):
    """Another node writes what it likes into the options of a call."""

    def theirs(func, *args, **kwargs):
        return func(*args, **kwargs)

    def renumber(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        replaced = {**options, "patches_replace": {}, "block": ("double", index), "block_index": index}
        return executor(x, t, c_concat, c_crossattn, control, replaced, **kwargs)

    from comfy.patcher_extension import WrappersMP

    model = comfy.patched(wan, strict=False, **SPARSE).clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "theirs", renumber)
    assert torch.isfinite(comfy.sample(model, GRID, steps=3)).all()


def test_a_wrapper_that_passes_keywords(comfy, wan):
    """The host's own argument names; what is left out is what the host gives then."""
    from comfy.patcher_extension import WrappersMP

    def by_name(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        return executor(x, t, c_crossattn=c_crossattn, transformer_options=options, **kwargs)

    expected = comfy.sample(comfy.patched(wan, **SPARSE), GRID, steps=3)
    model = wan.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "theirs", by_name)
    model = comfy.patched(model, **SPARSE)
    assert torch.equal(comfy.sample(model, GRID, steps=3), expected)
    assert comfy.report(model).calls["sparse"] == 2 * comfy.LAYERS


def test_an_attention_that_is_set_while_sampling(comfy, wan):
    """PARO stands before it, as before one that was there; what PARO leaves alone is theirs."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def theirs(func, *args, **kwargs):
        seen.append(1)
        return func(*args, **kwargs)

    def wrap(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        return executor(x, t, c_concat, c_crossattn, control, {**options, SLOT: theirs}, **kwargs)

    model = wan.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "theirs", wrap)
    model = comfy.patched(model, **SPARSE)
    comfy.sample(model, GRID, steps=3)
    assert comfy.report(model).calls == {"sparse": 2 * comfy.LAYERS, "dense step": comfy.LAYERS}
    assert len(seen) == comfy.LAYERS + 3 * comfy.LAYERS  # the dense step, and cross-attention


def test_a_guider_of_two_models_keeps_each_as_it_was_patched(comfy, wan, wan_file):
    """The host calls the second model with the first one's options."""
    nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler", reason="NO av: the host's own nodes")
    if not hasattr(nodes, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no guider of two models")
    model, empty = comfy.patched(wan, **SPARSE), comfy.latent(GRID)
    guider = nodes.Guider_DualModel(model, comfy.load(wan_file))
    guider.set_conds(comfy.text(1), comfy.text(2))
    guider.set_cfg(3.0)
    sigmas = comfy.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    with torch.inference_mode():
        noise = comfy.comfy.sample.prepare_noise(empty, 0)
        guider.sample(noise, empty, comfy.comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
    report = comfy.report(model)
    assert report.calls == {"sparse": 3 * comfy.LAYERS, "dense step": comfy.LAYERS}
    assert report.passed == [("an evaluation of another model than the one that was patched", 4)]


def test_a_second_model_whose_run_cannot_begin(comfy, wan, wan_file, caplog):
    nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler", reason="NO av: the host's own nodes")
    if not hasattr(nodes, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no guider of two models")
    for strict in (False, True):
        model, other = (comfy.patched(each, strict=strict, **SPARSE) for each in (wan, comfy.load(wan_file)))
        other.get_attachment("paro").start = raising
        guider = nodes.DualModelGuider.execute(model, comfy.text(1), 3.0, other, comfy.text(2))[0]
        sigmas = comfy.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
        given = (comfy.comfy.samplers.sampler_object("euler"), sigmas)
        noise = comfy.comfy.sample.prepare_noise(comfy.latent(GRID), 0)
        if strict:
            with pytest.raises(OwnBugError):
                guider.sample(noise, comfy.latent(GRID), *given, disable_pbar=True, seed=0)
        else:
            guider.sample(noise, comfy.latent(GRID), *given, disable_pbar=True, seed=0)
            report = comfy.report(model)
            assert report.calls == {"sparse": 2 * comfy.LAYERS, "dense step": comfy.LAYERS}
            assert report.passed == [("an evaluation of another model than the one that was patched", 3)]
            assert sum(record.exc_info is not None for record in caplog.records) == 1


def test_a_second_model_has_the_report_of_its_last_run(comfy, wan, wan_file):
    """And none where that was cancelled."""
    nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler", reason="NO av: the host's own nodes")
    if not hasattr(nodes, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no guider of two models")

    def cancel(step, *_):
        if step == 1:
            raise OwnBugError

    model, other = comfy.patched(wan, **SPARSE), comfy.patched(comfy.load(wan_file), density=0.6, preset="custom")
    sigmas = comfy.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
    given = (comfy.comfy.samplers.sampler_object("euler"), sigmas)
    noise = comfy.comfy.sample.prepare_noise(comfy.latent(GRID), 0)
    for callback in (None, cancel):
        guider = nodes.DualModelGuider.execute(model, comfy.text(1), 3.0, other, comfy.text(2))[0]
        run = {"callback": callback, "disable_pbar": True, "seed": 0}
        if callback is None:
            out = guider.sample(noise, comfy.latent(GRID), *given, **run)
            for each, density in ((model, 0.4), (other, 0.6)):
                assert abs(comfy.report(each, out).density - density) < 0.05
        else:
            with pytest.raises(OwnBugError):
                guider.sample(noise, comfy.latent(GRID), *given, **run)
    for each in (model, other):
        assert comfy.report(each).startswith("Not finished: the sampling was stopped in step 2 of 3")


def test_copies_on_other_gpus_count_with_the_first_and_show_nothing(comfy, wan, store, monkeypatch):
    """Two names of one CPU: the host gives each prompt a thread and a copy of the model."""
    nodes = pytest.importorskip("comfy_extras.nodes_multigpu", reason="this ComfyUI has no copies on other GPUs")
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(comfy.comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)
    said = []
    model = nodes.MultiGPUCFGSplitNode.execute(comfy.patched(wan, store=store, said=said, **SPARSE), 2)[0]
    comfy.sample(model, GRID, steps=3)
    report = comfy.report(model)
    assert report.calls == {"sparse": 2 * 2 * comfy.LAYERS, "dense step": 2 * comfy.LAYERS} and not report.passed
    assert report.sites == report.sites_sparse == comfy.LAYERS and report.steps == 3
    assert sum("step 2/3" in line for line in said) == 1 and len(store.names()) == 1


@pytest.mark.parametrize("what", ["identify", "family_of", "make_override", "Lifecycle"])
def test_a_model_that_cannot_be_read_passes_through(comfy, wan, monkeypatch, what):
    said = []
    monkeypatch.setattr(patching, what, raising if what != "Lifecycle" else Unmade)
    model = comfy.patched(wan, strict=False, said=said, **SPARSE)
    assert torch.equal(comfy.sample(model, GRID, steps=2), comfy.sample(wan, GRID, steps=2))
    assert "Not used: the model could not be read (OwnBugError: an index" in said[0]
    assert "could not be read" in comfy.report(model)
    with pytest.raises(OwnBugError):
        comfy.patched(wan, strict=True, **SPARSE)


def test_a_run_for_each_copy_and_each_patched_model():
    started = []

    def life(name):
        def start(sigmas, sampled):
            started.append((name, sigmas))
            return SimpleNamespace(sigmas=sigmas, quiet=False)

        return wrappers.Lifecycle(name, start)

    def model_with(attached):
        model = torch.nn.Module()
        model.current_patcher = SimpleNamespace(get_attachment={"paro": attached}.get)
        return model

    own, copy, unpatched, patched = "own", "copy", model_with("a reason"), model_with(life("second"))
    copies = {"multigpu_clones": {"cuda:0": SimpleNamespace(model=own), "cuda:1": SimpleNamespace(model=copy)}}
    guider = SimpleNamespace(model_patcher=SimpleNamespace(model=own), model_options=copies)
    run = HostRun(SimpleNamespace(sigmas=[1.0, 0.0]), "first", guider, life("first"))
    assert run.of(own) is run and run.of("other") is None and run.of(unpatched) is None and not run.beside
    assert run.of(copy) is run.of(copy) and run.of(copy) is not run
    assert (run.of(copy).family, run.of(copy).session.quiet) == ("first", True)
    assert (run.of(patched).family, run.of(patched).session.quiet) == ("second", False)
    assert started == [("first", [1.0, 0.0]), ("second", [1.0, 0.0])] and len(run.beside) == 2
    assert HostRun(None, None, object()).of("other").session is None  # a guider that does not tell


def test_a_report_belongs_to_the_run_that_made_the_latent(comfy, wan):
    """A second sampler with the same model, a high-resolution pass say, has a report of its own."""
    model, other = comfy.patched(wan, **SPARSE), (5, 9, 9)
    first, second = (comfy.sample(model, grid, steps=3) for grid in (GRID, other))
    again = comfy.sample(model, other, steps=3, seed=1)
    for samples, grid in ((first, GRID), (second, other), (again, other), (first.clone(), GRID)):
        assert comfy.report(model, samples).grid == grid
    assert comfy.report(model, second) is not comfy.report(model, again)
    # What another node made of a latent is not known again: then it is the last run's.
    for unknown in (first * 2, None, "a latent", torch.empty(2, device="meta"), torch.eye(3).to_sparse(), first[:0]):
        assert comfy.report(model, unknown) is comfy.report(model, again)
    # The report of a latent that is not known says that it may be another's.
    assert patching.is_of_another_run(model, first * 2) and not patching.is_of_another_run(model, first)
    assert not patching.is_of_another_run(wan, first)
    # A run whose result is no plain tensor is the last one, until the next.
    kept = model.get_attachment("paro")
    kept.last_report = comfy.report(model, first)
    assert comfy.report(model, None) is comfy.report(model, first)
    for seed in range(2, 2 + wrappers.KEPT_REPORTS):
        comfy.sample(model, GRID, steps=2, seed=seed)
    assert comfy.report(model, first).steps == 2 and len(model.get_attachment("paro")._reports) == wrappers.KEPT_REPORTS


def test_clones_of_a_patched_model_have_reports_of_their_own(comfy, wan):
    """Nodes behind PARO make clones that share what PARO keeps: every run has its own report, whichever of the models
    PARO Report is connected to."""
    from comfyui_paro.paro_runtime.host.patching import last_report

    patched = comfy.patched(wan, **SPARSE)
    clones = [patched.clone() for _ in range(2)]
    found = [(comfy.sample(clone, GRID, steps=steps), steps) for clone, steps in zip(clones, (3, 5), strict=True)]
    for out, steps in found:
        for model in (patched, *clones):
            report = last_report(model, out)
            assert (report.steps, report.calls["sparse"]) == (steps, (steps - 1) * comfy.LAYERS)


def test_a_clone_that_is_stopped_takes_no_report_from_another(comfy, wan):
    from comfyui_paro.paro_runtime.host.patching import last_report

    def stop(step, *_):
        raise OwnBugError

    patched = comfy.patched(wan, **SPARSE)
    out = comfy.sample(patched.clone(), GRID, steps=3)
    with pytest.raises(OwnBugError):
        comfy.sample(patched.clone(), GRID, steps=4, callback=stop)
    assert last_report(patched, out).steps == 3
    assert last_report(patched, out * 2).startswith("Not finished: the sampling was stopped in step 1 of 4")


def test_a_guider_whose_second_model_alone_is_patched_runs_as_without_paro(comfy, wan, wan_file):
    """The host asks nothing of the second model's own options; PARO has no part in it, and says that it has not run."""
    nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler", reason="NO av: the host's own nodes")
    if not hasattr(nodes, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no guider of two models")
    sigmas = comfy.comfy.samplers.calculate_sigmas(wan.get_model_object("model_sampling"), "simple", 3)
    noise, other, outs = comfy.comfy.sample.prepare_noise(comfy.latent(GRID), 0), comfy.load(wan_file), []
    for second in (other, model := comfy.patched(other, strict=True, **SPARSE)):
        guider = nodes.DualModelGuider.execute(wan, comfy.text(1), 3.0, second, comfy.text(2))[0]
        given = (comfy.comfy.samplers.sampler_object("euler"), sigmas)
        with torch.inference_mode():
            outs.append(guider.sample(noise, comfy.latent(GRID), *given, disable_pbar=True, seed=0))
    assert torch.equal(*outs) and comfy.report(model).startswith("PARO has not run yet")


def test_a_model_that_was_compiled_without_paro_is_compiled_anew(comfy, wan):
    """The host's compile node drops every guard that would tell the old graph that the options are others."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    nodes = pytest.importorskip("comfy_extras.nodes_torch_compile")

    def compiled(model):
        clone = model.clone()
        set_torch_compile_wrapper(
            model=clone, backend="eager", options={"guard_filter_fn": nodes.skip_torch_compile_dict}
        )
        return clone

    torch.compiler.reset()
    comfy.sample(compiled(wan), GRID, steps=3)
    model = compiled(comfy.patched(wan, **SPARSE))
    out = comfy.sample(model, GRID, steps=3)
    report = comfy.report(model)
    assert report.calls == {"sparse": 2 * comfy.LAYERS, "dense step": comfy.LAYERS} and not report.passed
    assert report.notes == ["the model had been compiled without PARO: it is compiled anew"]
    assert torch.equal(out, comfy.sample(model, GRID, steps=3)) and not comfy.report(model).notes


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 4, 3, 8, 8), (2, 3, 4, 5, 6, 7), (0, 16, 3, 8, 8), ()])
def test_the_demos_decoder_refuses_other_latents_in_one_sentence(comfy, shape):
    from comfyui_paro.nodes.demo import PARODemoDecode

    with pytest.raises(ValueError, match=r"^samples: a latent of shape .* is not one of the tiny demo model's$"):
        PARODemoDecode.execute({"samples": torch.zeros(shape)})


def test_a_result_that_cannot_be_told_from_others_for_want_of_memory_is_kept(monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(wrappers.torch, "linspace", no_memory)
    assert wrappers.mark_of(torch.zeros(3)) is None


def test_what_is_done_around_a_call_costs_no_generation(comfy, wan, monkeypatch):
    """A control that is no dict, as another node may give; a call that cannot be read; the end of a run."""
    around = [
        (wrappers, "_copied", raising),
        (wrappers, "repeatable", raising),
        (HostRun, "compiles_anew", raising),
        (calls_module, "_read", raising),
        (HostRun, "beside", property(raising)),
        (wrappers, "others_around", raising),
        (wrappers, "stand_around", raising),
    ]
    for where, what, fault in around:
        with monkeypatch.context() as patch:
            patch.setattr(where, what, fault)
            assert torch.isfinite(comfy.sample(comfy.patched(wan, strict=False, **SPARSE), GRID, steps=3)).all()
            with pytest.raises(OwnBugError):
                comfy.sample(comfy.patched(wan, strict=True, **SPARSE), GRID, steps=3)


def test_one_verdict_for_all_copies_of_a_model(monkeypatch, caplog):
    """Sessions of a model's copies on other GPUs neither log nor record what the run's own report says of all."""
    monkeypatch.setattr(wrappers.saved, "add", lambda *given: pytest.fail("recorded"))
    said, report = [], SimpleNamespace(status=lambda: "a verdict", plan=None)
    clock = SimpleNamespace(step=0)
    copy = SimpleNamespace(
        quiet=True, finish=lambda: report, log=SimpleNamespace(clock=clock), steps=2, say=said.append
    )
    life = wrappers.Lifecycle("wan", None, on_status=said.append)
    with caplog.at_level(logging.INFO, "paro"):
        assert life._finish(copy) is report
        life._stop(copy)
    assert not said and not caplog.records and life.why_no_report == wrappers.NOT_RUN


def test_a_run_that_cannot_begin_says_so_everywhere(comfy, wan, monkeypatch, caplog):
    """The node, the report and the console have the same sentence, and the picture is made."""

    def raising(*given, **more):
        raise OwnBugError("no session")

    said = []
    model = comfy.patched(wan, strict=False, said=said, **SPARSE)
    monkeypatch.setattr(patching, "Session", raising)
    with caplog.at_level(logging.INFO, "paro"):
        assert torch.equal(comfy.sample(model, GRID, steps=2), comfy.sample(wan, GRID, steps=2))
    why = comfy.report(model)
    assert why.startswith("Not used: the run could not begin (OwnBugError: no session)") and said[-1] == why
    assert [each.getMessage() for each in caplog.records].count(f"PARO: {why}") == 1
