"""The life of a run: sparse steps, other overrides, unknown models, masks, cancelling, calibration."""

import logging

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.config.settings import Settings, SettingsError
from comfyui_paro.paro_runtime.host.calibration_run import Sampling, calibrate
from comfyui_paro.paro_runtime.host.override import SLOT
from comfyui_paro.paro_runtime.plan.plan import PlanError, Site
from comfyui_paro.paro_runtime.plan.store import PlanStore

pytestmark = pytest.mark.host_on_cpu

GRID = (5, 7, 9)
SPARSE = {"preset": "custom", "density": 0.4, "dense_steps": 1}


def test_sparse_run_and_its_report(comfy, wan, store):
    said = []
    model = comfy.patched(wan, store=store, said=said, **SPARSE)
    out, dense = comfy.sample(model, GRID, steps=4), comfy.sample(wan, GRID, steps=4)
    report = comfy.report(model)
    assert report.sites == report.sites_sparse == comfy.LAYERS
    assert report.calls == {"sparse": 3 * comfy.LAYERS, "dense step": comfy.LAYERS}
    assert abs(report.density - 0.4) < 0.05 and report.plan.made["criterion"] == "mass"  # seen in pure noise
    assert report.sites_routed == comfy.LAYERS
    assert not report.fallbacks and not report.passed
    assert torch.isfinite(out).all() and (out - dense).abs().max() > 0.01  # the exact tests' tolerance is far below
    assert said[-1] == report.status() and said[-1].startswith(report.verdict())
    # A report is kept with the model: it shows the plan.
    assert report.picture() is not None


def test_a_run_that_starts_from_a_picture_sees_no_pure_noise(comfy, wan, store):
    model = comfy.patched(wan, store=store, **SPARSE)
    empty, noise = comfy.latent(GRID), torch.randn(comfy.latent(GRID).shape)
    texts = comfy.text(1), comfy.text(2)
    options = {"denoise": 0.6, "disable_pbar": True, "seed": 0}
    comfy.comfy.sample.sample(model, noise, 3, 1.0, "euler", "simple", *texts, empty, **options)
    report = comfy.report(model)
    assert report.dense_steps == 0 and report.plan.made["criterion"] == "error"


@pytest.mark.parametrize("sampler, evaluations", [("euler", 4), ("heun", 7)])
def test_steps_of_multi_stage_samplers(comfy, wan, store, sampler, evaluations):
    """heun evaluates twice a step; the second evaluation of step 0 is at the sigma of step 1."""
    model = comfy.patched(wan, store=store, **SPARSE)
    comfy.sample(model, GRID, steps=4, sampler=sampler)
    calls = comfy.report(model).calls
    assert sum(calls.values()) == evaluations * comfy.LAYERS
    assert calls["dense step"] == comfy.LAYERS


def test_dense_blocks_by_number(comfy, wan, store):
    model = comfy.patched(wan, store=store, dense_blocks="-1", **SPARSE)
    comfy.sample(model, GRID)
    report = comfy.report(model)
    assert report.sites_sparse == comfy.LAYERS - 1 and report.sites_dense_blocks == 1


def test_settings_that_do_nothing_are_told(comfy, wan, store):
    """Dense blocks that the model has not got, and the first of two nodes in a row."""
    before = comfy.patched(wan, store=store, density=0.9, preset="custom")
    said = []
    model = comfy.patched(before, store=store, said=said, dense_blocks="90-95", **SPARSE)
    comfy.sample(model, GRID)
    report = comfy.report(model)
    assert report.sites_sparse == comfy.LAYERS and abs(report.density - 0.4) < 0.05
    replaced, named = report.notes
    assert (
        "this one replaces it" in replaced and replaced in said and named.startswith("dense_blocks: the model has none")
    )
    model = comfy.patched(wan, store=store, dense_blocks="0", **SPARSE)
    comfy.sample(model, GRID)
    assert not comfy.report(model).notes


def test_image_to_video_model(comfy, store, tmp_path):
    """Twice as many latent channels, and a third attention per block that asks for full precision."""
    model = comfy.load(comfy.build_wan(tmp_path / "i2v.safetensors", "i2v", in_dim=36))
    patched = comfy.patched(model, store=store, **SPARSE)
    comfy.sample(patched, GRID, clip_vision_output=_ClipVision())
    report = comfy.report(patched)
    assert report.sites_sparse == comfy.LAYERS and not report.passed


def test_text_as_long_as_the_video(comfy, wan, store):
    """Cross-attention over as many text tokens as there are video tokens is not taken for self-attention."""
    grid = (1, 16, 16)
    words = torch.randn(1, 256, comfy.TEXT_WIDTH)
    empty, noise = comfy.latent(grid), torch.randn(comfy.latent(grid).shape)
    model = comfy.patched(wan, store=store, **SPARSE)
    comfy.comfy.sample.sample(
        model, noise, 3, 1.0, "euler", "simple", [[words, {}]], [[words, {}]], empty, disable_pbar=True, seed=0
    )
    report = comfy.report(model)
    assert report.sites_sparse == comfy.LAYERS
    assert report.passed == [("a second attention of the same length in one block", 3 * comfy.LAYERS)]


class _ClipVision:
    """Image features as the host's CLIP vision model gives them."""

    penultimate_hidden_states = torch.randn(1, 257, 1280)


def _counting(log: list, container: bool = False):
    """Another node's override, which runs the original and counts."""

    def override(func, *args, **kwargs):
        log.append(args[0].shape)
        return func(*args, **kwargs)

    if container:
        override.container_function = lambda *args, **kwargs: log.append("container")
    return override


@pytest.mark.parametrize("theirs_first", [True, False])
def test_other_overrides_run_where_paro_does_not(comfy, wan, store, theirs_first):
    """Installed before or after PARO, another node's attention computes the dense calls and only those."""
    log: list = []
    if theirs_first:
        base = wan.clone()
        base.model_options["transformer_options"][SLOT] = _counting(log)
        model = comfy.patched(base, store=store, **SPARSE)
    else:
        model = comfy.patched(wan, store=store, **SPARSE).clone()
        model.model_options["transformer_options"][SLOT] = _counting(log)
    alone = comfy.patched(wan, store=None, **SPARSE)
    assert torch.equal(comfy.sample(model, GRID), comfy.sample(alone, GRID))
    assert comfy.report(model).sites_sparse == comfy.LAYERS
    cross, dense_self = 3 * comfy.LAYERS, comfy.LAYERS
    assert len(log) == cross + dense_self


def test_an_override_that_wraps_paros_is_not_asked_twice(comfy, wan, store):
    """A later node that chains politely: PARO stands first, theirs computes what is dense, nothing recurses."""
    log: list = []
    model = comfy.patched(wan, store=store, **SPARSE).clone()
    inner = model.model_options["transformer_options"][SLOT]

    def polite(func, *args, **kwargs):
        log.append(1)
        return inner(func, *args, **kwargs)

    model.model_options["transformer_options"][SLOT] = polite
    alone = comfy.patched(wan, store=None, **SPARSE)
    assert torch.equal(comfy.sample(model, GRID), comfy.sample(alone, GRID))
    assert comfy.report(model).calls == {"sparse": 2 * comfy.LAYERS, "dense step": comfy.LAYERS}
    assert len(log) == 4 * comfy.LAYERS


def test_removing_paro_gives_the_other_override_back(comfy, wan):
    theirs = _counting([])
    base = wan.clone()
    base.model_options["transformer_options"][SLOT] = theirs
    from comfyui_paro.paro_runtime.host.patching import remove

    assert remove(comfy.patched(base)).model_options["transformer_options"][SLOT] is theirs
    assert SLOT not in remove(comfy.patched(wan)).model_options["transformer_options"]


def test_unknown_model_passes_through(comfy, wan):
    class Strange(torch.nn.Module):
        pass

    model = wan.clone()
    model.model = type("Base", (), {"diffusion_model": Strange(), "current_patcher": None})()
    said: list = []
    patched = comfy.patched(model, said=said)
    verdict = "Not used: the model class Strange is not supported; nothing to do: docs/models.md lists what is"
    assert said == [verdict]
    assert SLOT not in patched.model_options["transformer_options"] and not patched.wrappers.get("outer_sample")
    assert comfy.report(patched) == verdict
    assert comfy.report(wan).startswith("Not used: PARO is not on this model, or is switched off; put PARO Patch Model")


def test_a_model_changed_beyond_recognition_runs_dense(comfy, wan, store, monkeypatch):
    model = comfy.patched(wan, store=store, **{**SPARSE, "strict": False})
    monkeypatch.setattr(wan.model.diffusion_model, "patch_size", None)
    monkeypatch.setattr(type(wan.model.diffusion_model), "_forward", lambda self, x, *args, **kwargs: x)
    comfy.sample(model, GRID)
    assert "the token layout could not be read (TypeError" in comfy.report(model).passed[0][0]


def test_small_latent_runs_dense_with_a_reason(comfy, wan, store):
    """Fewer tokens than two blocks."""
    grid = (1, 4, 5)
    model = comfy.patched(wan, store=store, **SPARSE)
    assert torch.equal(comfy.sample(model, grid), comfy.sample(wan, grid))
    report = comfy.report(model)
    assert "20 grid tokens do not fill two blocks" in report.passed[0][0]
    assert report.verdict().startswith("Not used: 20 grid tokens do not fill two blocks of 64; nothing to do: ")


def test_cancelling_leaves_nothing_behind(comfy, wan, store):
    said: list = []
    model = comfy.patched(wan, store=store, said=said, **SPARSE)

    class CancelError(Exception):
        pass

    def cancel(step, *_):
        if step == 1:
            raise CancelError

    assert comfy.report(model) == "PARO has not run yet: sample with this model first"
    with pytest.raises(CancelError):
        comfy.sample(model, GRID, callback=cancel)
    assert "paro" not in model.model_options["transformer_options"]
    # Called when step 2 of 3 is over.
    stopped = "Not finished: the sampling was stopped in step 2 of 3; sample again for a report"
    assert comfy.report(model) == said[-1] == stopped
    out = comfy.sample(model, GRID)
    assert comfy.report(model, out).sites_sparse == comfy.LAYERS
    with pytest.raises(CancelError):
        comfy.sample(model, GRID, callback=cancel)
    # What an earlier run made keeps its report; another latent does not get it.
    assert comfy.report(model, out).sites_sparse == comfy.LAYERS and comfy.report(model, out * 2) == stopped


def test_the_verdict_is_logged_once_in_a_run(comfy, wan, store, caplog):
    said = []
    model = comfy.patched(wan, store=store, said=said, **SPARSE)
    with caplog.at_level(logging.INFO, "paro"):
        comfy.sample(model, GRID, steps=4)
    report = comfy.report(model)
    told = [each for each in caplog.records if report.verdict() in each.getMessage()]
    assert [(each.name, each.levelname, each.getMessage()) for each in told] == [
        ("paro", "INFO", f"PARO: {report.status()}")
    ]
    assert said[-1] == report.status() and report.text().startswith(report.verdict())
    assert sum("3 of 4 steps sparse" in text for text in said) == 1


def test_given_plans(comfy, wan, flux, store):
    """A plan of another model is refused when the node runs; one of another grid is moved, and the report says so."""
    of_flux = comfy.full_plan(flux, "flux", TokenLayout(7, (1, 9, 9)), "FHW", comfy.flux_sites())
    with pytest.raises(PlanError, match=r"^plan: made for flux, the model is wan; choose a plan of this model"):
        comfy.patched(wan, plan=of_flux)
    of_grid = comfy.full_plan(wan, "wan", TokenLayout(0, (3, 9, 9)), "HWF", comfy.wan_sites())
    model = comfy.patched(wan, plan=of_grid, store=store, **SPARSE)
    comfy.sample(model, GRID)
    report = comfy.report(model)
    assert "moved from the grid 3x9x9" in report.notes[0]
    assert report.sites_sparse == comfy.LAYERS


def test_lora_rides_on_its_base(comfy, wan):
    """Weight patches, applied in place while the model is loaded, do not change the identity."""
    from comfyui_paro.paro_runtime.host.identity import identify

    before = identify(wan, "wan")
    lora = wan.clone()
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    lora.add_patches({key: (torch.ones_like(wan.model.diffusion_model.blocks[0].self_attn.q.weight),)}, 0.5)
    comfy.sample(lora, (1, 4, 4), steps=1)
    assert identify(lora, "wan") == identify(wan, "wan") == before


@torch.inference_mode()
def _calibrate(comfy, model, store, **changes):
    sampling = Sampling({"samples": comfy.latent(GRID)}, 0, 3, 3.0, "euler", "simple")
    values = {"settings": Settings(**SPARSE), "steps": "", "store": store, "name": "", "on_status": print, **changes}
    return calibrate(model, comfy.text(2), [comfy.text(1), comfy.text(5)], sampling, **values)


def test_calibrate(comfy, wan, store):
    """Two prompts, and the plan is found by a later run with the same settings."""
    made = _calibrate(comfy, wan, store)
    assert set(made.plan.sites) == set(comfy.wan_sites())
    assert made.plan.layout == TokenLayout(0, GRID)
    assert made.picture.shape[0] == 1 and made.picture.shape[3] == 3
    assert made.file in store.names() and made.file in made.text
    for remember in (False, True):  # it was made on purpose
        model = comfy.patched(wan, store=store, remember=remember, **SPARSE)
        comfy.sample(model, GRID)
        assert comfy.report(model).plan_source == "plan found"


def test_the_same_seed_gives_the_same_picture_whatever_ran_before(comfy, wan, store):
    """Plans are neither kept nor found: other seeds, lengths and even a plan that was kept before change nothing."""

    def sampled(grid=GRID, seed=0, remember=False):
        model = comfy.patched(wan, store=store, remember=remember, **SPARSE)
        out = comfy.sample(model, grid, steps=5, cfg=1.0, seed=seed)
        return out, comfy.report(model)

    first, report = sampled()
    assert report.plan_source == "calibrated on the way" and store.names() == []
    other, _ = sampled(seed=1, remember=True)
    assert len(store.names()) == 1
    sampled((5, 8, 6), seed=2)
    again, report = sampled()
    assert report.plan_source == "calibrated on the way" and not report.notes
    assert torch.equal(first, again) and not torch.equal(first, other)
    found, report = sampled(remember=True)
    assert report.plan_source == "plan found" and not torch.equal(found, first)


def test_calibrate_chosen_steps_under_a_name(comfy, wan, store):
    watched = _calibrate(comfy, wan, store, steps="1, -1", name="mine")
    assert watched.file == "mine.safetensors"
    assert watched.plan.made["observations"] * 3 == _calibrate(comfy, wan, store).plan.made["observations"] * 2


def test_calibrate_goes_on_where_it_was_stopped(comfy, wan, tmp_path):
    """Stopped in the second prompt: no plan, then the first is not run again and the plan is the same."""
    whole = _calibrate(comfy, wan, PlanStore([], tmp_path / "whole"))
    store = PlanStore([], tmp_path / "stopped")

    class StoppedError(Exception):
        pass

    def stop(text):
        if text.startswith("prompt 2/2"):
            raise StoppedError

    with pytest.raises(StoppedError):
        _calibrate(comfy, wan, store, on_status=stop)
    assert store.names() == [] and any((tmp_path / "stopped" / "unfinished").iterdir())
    said = []
    made = _calibrate(comfy, wan, store, on_status=said.append)
    assert "taken up again: 1 prompt(s)" in made.text
    assert not any(text.startswith("prompt 2/") for text in said)
    assert not (tmp_path / "stopped" / "unfinished").exists()
    for site, entry in whole.plan.sites.items():
        assert made.plan.sites[site].orders == entry.orders
        assert torch.equal(made.plan.sites[site].packed, entry.packed)


def test_calibrate_refuses(comfy, wan, store):
    with pytest.raises(SettingsError, match="calibrate_steps: 'x' is not a number"):
        _calibrate(comfy, wan, store, steps="x")
    with pytest.raises(PlanError, match="not a plain file name"):
        _calibrate(comfy, wan, store, name="../x")


def test_sites_of_flux(comfy, flux, store):
    model = comfy.patched(flux, store=store, **SPARSE)
    comfy.sample(model, (1, 16, 16), video=False, cfg=1.0)
    assert comfy.report(model).sites_sparse == 3
    assert set(store.load(store.names()[0]).sites) == {Site("double", 0), Site("single", 0), Site("single", 1)}


def test_compiled_model(comfy, wan, store):
    """Inside a compiled model every step still decides for itself: the override is no part of the graph."""
    helpers = pytest.importorskip("comfy_api.torch_helpers")
    compiled = wan.clone()
    helpers.set_torch_compile_wrapper(compiled, backend="eager")
    model = comfy.patched(compiled, store=store, **SPARSE)
    comfy.sample(model, GRID, steps=4)
    report = comfy.report(model)
    assert report.calls == {"sparse": 3 * comfy.LAYERS, "dense step": comfy.LAYERS}
    assert store.names() and comfy.identify(compiled, "wan") == comfy.identify(wan, "wan")


def test_experts_in_scaled_fp8_are_told_apart(comfy, wan_file):
    """High and low noise: two models of one architecture, both in FP8 with scales."""
    from comfyui_paro.paro_runtime.host.identity import identify
    from comfyui_paro.tests.host.compositions_model import in_scaled_fp8
    from safetensors.torch import load_file

    high, low = load_file(wan_file), load_file(wan_file)
    drawn = torch.Generator().manual_seed(9)
    low = {key: value + torch.randn(value.shape, generator=drawn) * 0.05 for key, value in low.items()}
    load = comfy.comfy.sd.load_diffusion_model_state_dict
    first, again, second = (identify(load(in_scaled_fp8(dict(weights))), "wan") for weights in (high, high, low))
    assert first == again and first.architecture == second.architecture and first.weights != second.weights
