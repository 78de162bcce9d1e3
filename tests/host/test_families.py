"""Every supported architecture in the real sampler: exact at density 1, sparse where intended, reported, removed."""

from __future__ import annotations

import pytest
import torch
from comfyui_paro.tests.host.cases import Case, Run, check, describe
from comfyui_paro.tests.host.cases_image import CASES as IMAGE_CASES
from comfyui_paro.tests.host.cases_video import CASES as VIDEO_CASES

pytestmark = pytest.mark.host_on_cpu

CASES = {case.name: case for case in (*VIDEO_CASES, *IMAGE_CASES)}
EXACT = {"preset": "custom", "density": 1.0, "precision": "16bit", "tail": "off", "dense_steps": 0}
SPARSE = {"preset": "custom", "density": 0.4, "dense_steps": 1}
# Both sides compute in float32; sums over some hundred keys in another order, amplified by guidance.
CLOSE = {"atol": 5e-4, "rtol": 5e-4}
TOO_OLD = "does not tell which block is running"


def build(tiny, name: str):
    """The case and its model; skipped, with a line, on a host that does not know the architecture."""
    case = CASES[name]
    if not tiny.known(case):
        pytest.skip(f"this ComfyUI has no {case.config}")
    return case, tiny.build(case)


def guided_run(tiny, case: Case) -> Run:
    """LTX's run with a guide frame, where this host knows it in that form."""
    if case.runs[2] not in tiny.runs(case):
        pytest.skip("this ComfyUI takes guide frames in another form")
    return case.runs[2]


@pytest.mark.parametrize("name", CASES)
def test_family(comfy, tiny, name):
    from comfyui_paro.paro_runtime.host.families import FAMILIES
    from comfyui_paro.paro_runtime.host.patching import remove

    case, model = build(tiny, name)
    assert [f.name for f in FAMILIES if f.recognise(model.model.diffusion_model)] == [case.family]
    dense = None
    for run in tiny.runs(case):
        dense = tiny.sample(model, case, run)
        exact = comfy.patched(model, **EXACT)
        out = tiny.sample(exact, case, run)
        torch.testing.assert_close(out, dense, **CLOSE)
        rounding = (out - dense).abs().max()
        report = comfy.report(exact)
        if report.passed and all(TOO_OLD in reason for reason, _ in report.passed):
            assert describe(report) == run.layout and not report.sites
            pytest.skip(f"{case.name}: {report.passed[0][0]}")
        check(report, case, run, EXACT["dense_steps"])
        sparse = comfy.patched(model, **SPARSE)
        out = tiny.sample(sparse, case, run)
        assert torch.isfinite(out).all()
        assert (out - dense).abs().max() > 20 * rounding
        check(comfy.report(sparse), case, run, SPARSE["dense_steps"])
    assert torch.equal(tiny.sample(remove(sparse), case, run), dense)
    assert torch.equal(tiny.sample(model, case, run), dense)


def test_wan_animate_2_is_left_alone_while_its_pose_is_on(comfy, tiny):
    case, model = build(tiny, "wan_animate2")
    run = Run(case.runs[0].shape, "", lambda: {"pose_video_latent": torch.zeros(1, 16, 4, 14, 18)})
    said: list = []
    patched = comfy.patched(model, said=said, **SPARSE)
    assert torch.equal(tiny.sample(patched, case, run), tiny.sample(model, case, run))
    assert said[-1].startswith("Not used: Wan Animate 2 attends frame by frame while its pose is on; nothing to do")


def test_ltx_guides_of_reduced_strength_run_in_the_host(comfy, tiny):
    """The host splits such a self-attention into rectangular calls."""
    case, model = build(tiny, "ltxv")
    guided = guided_run(tiny, case)
    entries = [{"pre_filter_count": 99, "strength": 0.5, "pixel_mask": None, "latent_shape": None}]
    run = Run(guided.shape, "", lambda: {**guided.extra(), "guide_attention_entries": entries})
    if torch.equal(tiny.sample(model, case, run), tiny.sample(model, case, guided)):
        pytest.skip("this ComfyUI does not attenuate guides")
    patched = comfy.patched(model, **SPARSE)
    assert torch.equal(tiny.sample(patched, case, run), tiny.sample(model, case, run))
    # Older hosts make one call with a mask of queries by keys of it.
    reason = comfy.report(patched).passed[0][0]
    assert "no self-attention over the 396 tokens" in reason or "a mask of shape [1, 1, 396, 396]" in reason


def test_ltx_video_tokens_taken_out_by_a_mask(comfy, tiny):
    case, model = build(tiny, "ltxv")
    guided = guided_run(tiny, case)

    def extra() -> dict:
        conditioning = guided.extra()
        conditioning["concat_mask"][..., 0, 0, 0] = -1
        return conditioning

    patched = comfy.patched(model, **SPARSE)
    tiny.sample(patched, case, Run(guided.shape, "", extra))
    assert comfy.report(patched).passed[0][0] == "LTX: a mask takes tokens out of the video itself"


def test_counted_calls_are_not_trusted_when_blocks_are_replaced(comfy, tiny):
    """LTX names no block: with a block replacement that may skip one, sites cannot be told apart."""
    case, model = build(tiny, "ltxv")
    clone = model.clone()
    clone.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)
    patched = comfy.patched(clone, **SPARSE)
    assert torch.equal(tiny.sample(patched, case, case.runs[0]), tiny.sample(model, case, case.runs[0]))
    assert "another node replaces blocks" in comfy.report(patched).passed[0][0]


def test_a_missing_call_is_noticed(comfy, tiny):
    """A model that skips an attention call nobody announced: the count is off, and PARO keeps every block."""
    case, model = build(tiny, "ltxv")
    skipped = model.model.diffusion_model.transformer_blocks[0].attn1
    skipped.forward = lambda x, **_: torch.zeros_like(x)
    with pytest.raises(RuntimeError, match="1 self-attention calls where 2 were expected"):
        tiny.sample(comfy.patched(model, **SPARSE), case, case.runs[0])
    patched = comfy.patched(model, strict=False, **SPARSE)
    assert torch.equal(tiny.sample(patched, case, case.runs[0]), tiny.sample(model, case, case.runs[0]))
    report = comfy.report(patched)
    assert report.notes == ["1 self-attention calls where 2 were expected: sites are not certain"]
    assert report.sites_sparse == 0


def test_refusals(comfy, tiny):
    from comfyui_paro.paro_runtime.host.families import family_of

    _, h3 = build(tiny, "minimax_h3")
    h3.model.diffusion_model.blocks[0].attn.to_gate_compress = torch.nn.Linear(2, 2)
    assert "to_gate_compress" in family_of(h3.model.diffusion_model)
    case = CASES["sdxl"]
    other = Case("sd15", "", "SDXL", case.unet | {"context_dim": 768}, (), 0)
    assert "only SDXL is supported" in family_of(tiny.build(other).model.diffusion_model)


def test_masked_prompts_run_as_more_chunks(comfy, tiny):
    """Regional prompts: three conditionings of two text lengths, in one batch or in several."""
    case, model = build(tiny, "flux")
    run = case.runs[0]
    mask = torch.zeros(1, *run.shape[2:])
    mask[..., :12] = 1
    positive = [*tiny.prompt(case, 1, mask=mask, mask_strength=1.0), *tiny.prompt(case, 3, mask=1 - mask)]
    longer = Case(case.name, "", "", {}, (), 0, text=(11, case.text[1]))
    both = [*positive, *tiny.prompt(longer, 4)]
    for conditioning in (positive, both):
        dense = tiny.sample(model, case, run, conditioning)
        patched = comfy.patched(model, **EXACT)
        torch.testing.assert_close(tiny.sample(patched, case, run, conditioning), dense, **CLOSE)
        report = comfy.report(patched)
        assert report.sites_sparse == case.sites and not report.passed and not report.fallbacks


def test_context_windows(comfy, tiny):
    """A long video in windows: the grid is that of a window, which later windows precede by an anchor frame."""
    windows = pytest.importorskip("comfy.context_windows")
    case, model = build(tiny, "wan_t2v")
    run = Run((1, 16, 7, 14, 18), "")
    handler = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule("standard_static"),
        fuse_method=windows.get_matching_fuse_method("pyramid"),
        context_length=5,
        context_overlap=2,
        context_stride=1,
        closed_loop=False,
        dim=2,
    )
    model.model_options["context_handler"] = handler
    dense = tiny.sample(model, case, run)
    patched = comfy.patched(model, **EXACT)
    torch.testing.assert_close(tiny.sample(patched, case, run), dense, **CLOSE)
    report = comfy.report(patched)
    assert describe(report) in ("0 + 5x7x9 + 0", "0 + 6x7x9 + 0")
    assert report.sites_sparse == case.sites and not report.passed


def test_blocks_are_numbered_from_the_end_where_the_model_does_not_count_them(comfy, tiny):
    case, model = build(tiny, "ltxv")
    patched = comfy.patched(model, dense_blocks="-1", **SPARSE)
    tiny.sample(patched, case, case.runs[0])
    report = comfy.report(patched)
    assert (report.sites_sparse, report.sites_dense_blocks) == (1, 1)


def test_calibrating_a_model_with_several_grids(comfy, tiny, store):
    """SDXL's plan is for its largest grid; the others are left alone while it is made."""
    from comfyui_paro.paro_runtime.config.settings import Settings
    from comfyui_paro.paro_runtime.host.calibration_run import Sampling, calibrate

    case, model = build(tiny, "sdxl")
    sampling = Sampling({"samples": tiny.latent(case.runs[0].shape)}, 0, 2, 2.0, "euler", "simple")
    made = calibrate(
        model,
        tiny.prompt(case, 2),
        [tiny.prompt(case, 1)],
        sampling,
        settings=Settings(**SPARSE),
        steps="",
        store=store,
        name="",
        on_status=lambda _: None,
    )
    assert made.plan.layout.grid == (1, 25, 23)
    assert 0 < len(made.plan.sites) < case.sites


@pytest.mark.parametrize(
    "run",
    [
        Run((1, 16, 15, 13), "7 + 1x15x13 + 0"),
        Run((1, 16, 17, 16), "7 + 1x17x16 + 0"),
        Run((1, 16, 15, 13), "37 + 1x15x13 + 0", lambda: {"reference_latents": [torch.randn(1, 16, 5, 6)]}),
    ],
)
def test_queries_of_the_image_alone(comfy, tiny, run):
    """Qwen-Image 2.1's calls: the image asks, text and references have keys and values only. A stand-in makes them."""
    from comfyui_paro.paro_runtime.host.patching import remove
    from comfyui_paro.tests.host import stand_in

    case, model = Case("qwen_image21", "qwen_image21", "", {}, (run,), 2), stand_in.build()
    torch.manual_seed(0)
    dense = tiny.sample(model, case, run)
    for settings in (EXACT, SPARSE):
        torch.manual_seed(0)
        patched = comfy.patched(model, **settings)
        out = tiny.sample(patched, case, run)
        check(comfy.report(patched), case, run, settings["dense_steps"])
        if settings is EXACT:
            torch.testing.assert_close(out, dense, **CLOSE)
        else:
            assert torch.isfinite(out).all() and (out - dense).abs().max() > 1e-3
    torch.manual_seed(0)
    assert torch.equal(tiny.sample(remove(patched), case, run), dense)


@pytest.mark.parametrize("name", ["minimax_h3", "cogvideox", "sd35_medium"])
def test_through_the_loader(comfy, tiny, name):
    """Weights alone are enough for the host to know the model and for PARO to know the family, at any size."""
    from comfy.sd import load_diffusion_model_state_dict
    from comfyui_paro.paro_runtime.host.families import family_of

    case, model = build(tiny, name)
    weights = {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}
    loaded = load_diffusion_model_state_dict(weights)
    assert family_of(loaded.model.diffusion_model).name == case.family


@pytest.mark.parametrize(
    "sampler, evaluations",
    [("dpmpp_sde", 2), ("dpm_2", 2), ("dpmpp_2s_ancestral", 2), ("heun", 1), ("res_multistep", 1), ("er_sde", 1)],
)
def test_steps_of_samplers_that_evaluate_in_between(comfy, wan, sampler, evaluations):
    """The first step's evaluations are dense, those at noise levels between two steps included."""
    model = comfy.patched(wan, **SPARSE)
    out = comfy.sample(model, (5, 7, 9), steps=4, sampler=sampler)
    report = comfy.report(model)
    assert torch.isfinite(out).all()
    assert report.calls["dense step"] == evaluations * comfy.LAYERS
    assert report.sites_sparse == comfy.LAYERS and not report.passed and not report.fallbacks
