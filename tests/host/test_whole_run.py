"""The whole-run benchmark in the real host: sizes of its models, and every row of a case at toy size."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

# Billions of parameters as published; MiniMax H3 with 40 of its 50 layers, LTX-2 without its text connectors.
SIZES = {"wan14b": 14.3, "wan1.3b": 1.42, "hunyuan15": 8.33, "ltx2": 18.9, "minimax_h3": 26.7, "flux": 11.9}
SIZES |= {"qwen_image": 20.4, "z_image": 6.15}


@pytest.mark.parametrize("name", SIZES)
def test_models_have_their_published_sizes(comfy, name):
    import comfy.supported_models
    from comfyui_paro.bench.paro_bench import real_models

    case = real_models.MODELS[name].case
    if not hasattr(comfy.supported_models, case.config):
        pytest.skip(f"this host does not know {case.config}")
    config = getattr(comfy.supported_models, case.config)(dict(case.unet))
    config.set_inference_dtype(torch.bfloat16, None)
    config.custom_operations = None
    network = config.get_model({}, "", device="meta").diffusion_model
    if name == "ltx2":
        case.prepare(network)
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(SIZES[name], rel=5e-3)


def test_every_model_is_sampled_at_a_real_size(comfy):
    from comfyui_paro.bench.paro_bench import real_models

    assert {run.model for run in real_models.RUNS.values()} == set(SIZES) == set(real_models.MODELS)
    for run in real_models.RUNS.values():
        tiny = real_models.MODELS[run.model].tiny.runs[0].shape
        shapes = [(run.latent, tiny)] if isinstance(tiny[0], int) else zip(run.latent, tiny, strict=True)
        assert all(len(real) == len(toy) and real[:2] == toy[:2] for real, toy in shapes)


@pytest.fixture
def runner(comfy, tmp_path):
    """Runs the rows of a case at toy size into a file, and returns them."""
    import comfy.model_management

    from bench import whole_run

    device = comfy.model_management.get_torch_device()

    def run(name: str, **changes) -> list[dict]:
        # Settings that make short sequences sparse on a GPU as well.
        settings = [("density", 0.4), ("min_tokens", 0), ("strict", True)]
        args = {"preset": "balanced", "setting": settings, "whats": ["dense", "int8", "paro"], "parts": True}
        args = SimpleNamespace(**{**args, "tiny": True, "dtype": "bfloat16", **changes})
        path = tmp_path / "rows.json"
        results = whole_run.Results(path, {"gpu": "none", "commit": "c"})
        with torch.inference_mode():
            good = whole_run.CaseRunner(name, args, device, results).run()
        rows = json.loads(path.read_text())["rows"]
        assert good == all("error" not in row for row in rows if row["attention"] != "int8")
        return rows

    return run


def test_all_rows_of_two_models_in_turn(runner):
    rows = runner("wan22-720p-2+2")
    dense, int8, ever, first, second, remembered = rows
    assert (dense["attention"], int8["attention"]) == ("dense", "int8")
    assert [row["run"] for row in rows[2:]] == ["first_ever", "first", "second", "remembered"]
    for row in (dense, *rows[2:]):
        assert row["finite"] and len(row["step_seconds"]) == 4
        # The rest is what a busy machine does between two lines.
        assert 0.5 * row["seconds"] < sum(row["parts"].values()) <= row["seconds"] + 1e-3
        assert row["parts"]["dense_attention"] > 0 and row["host_gb"] is not None
    assert dense["cosine"] == 1 and dense["speedup"] == 1
    for row in rows[2:]:
        assert row["sites_sparse"] == row["sites"] == 4 and not row["fallbacks"]
        assert row["parts"]["sparse_attention"] > 0 and row["parts"]["bias"] > 0
        assert row["cosine"] > 0.99 and row["speedup"] == pytest.approx(dense["seconds"] / row["seconds"], rel=1e-2)
    for row in (ever, first, second):
        # The second model's plan is its own: other weights.
        assert row["plan_source"] == ["calibrated on the way"] * 2
        assert row["parts"]["observing"] > 0 and row["parts"]["planning"] > 0
    assert remembered["plan_source"] == ["plan found"] * 2 and remembered["parts"]["loading_plan"] > 0
    assert remembered["parts"]["observing"] == remembered["parts"]["planning"] == 0
    assert dense["parts"]["sparse_attention"] == 0


def test_a_model_that_cannot_be_built_is_a_row_and_no_crash(runner, monkeypatch):
    from comfyui_paro.bench.paro_bench import real_models

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("too big")

    monkeypatch.setattr(real_models, "_build", full)
    assert all(row["error"] == "OutOfMemoryError: too big" for row in runner("flux-1024-8", whats=["paro"]))


def test_packed_latents_and_given_schedules(runner):
    dense, *paro = runner("ltx2-stage2", whats=["paro"], parts=False)
    assert len(dense["step_seconds"]) == 3 and dense["parts"] is None
    assert all(row["sites_sparse"] == row["sites"] == 2 for row in paro)


def test_the_hosts_sparse_kernel_runs_under_the_rules_of_its_node(comfy, monkeypatch):
    import comfy_kitchen
    from comfyui_paro.bench.paro_bench import attentions, real_models, timeline

    seen = []

    def sol_attn(q, k, v, *, scale=None, topk_ratio=0.0):
        seen.append((q.shape, topk_ratio))
        rows = [t.transpose(1, 2) for t in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*rows, scale=scale).transpose(1, 2)

    monkeypatch.setattr(comfy_kitchen, "sol_attn", sol_attn, raising=False)
    monkeypatch.setattr(attentions, "LEAST_TOKENS", 300)
    device, found = torch.device("cpu"), {}
    clock = timeline.Timeline(device)
    with torch.inference_mode():
        for name in ("wan14b-720p-4", "flux-1024-8"):
            loaded = real_models.load(real_models.RUNS[name], device, torch.float32, tiny=True)
            (model,) = loaded.patchers
            expected = real_models.sample(loaded, [model], lambda: None)
            sparse = model.clone()
            sparse.model_options["transformer_options"][attentions.SLOT] = attentions._sparse_override(
                model, None, False
            )
            seen.clear()
            with timeline.hooked(clock):
                clock.begin()
                out = real_models.sample(loaded, [attentions.watch(sparse, clock)], clock.step)
                clock.end()
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
            found[name] = list(seen)
    # The first step is dense; cross-attention never is sparse. 195 + 7 tokens of Flux are too few.
    assert found == {"wan14b-720p-4": [((1, 315, 2, 128), 0.3)] * 3 * 2, "flux-1024-8": []}
    assert clock.parts()["dense_attention"] > 0


def test_a_host_that_has_the_sparse_node_runs_it(comfy, monkeypatch):
    import sys

    pytest.importorskip("av", reason="NO av: the host's own nodes cannot be imported")
    import comfy_kitchen
    from comfy_api.latest import io
    from comfyui_paro.bench.paro_bench import attentions

    class BlockSparseAttention:
        @classmethod
        def execute(cls, model, selection, start_percent, end_percent, dense_blocks="", min_tokens=0, extra_tokens=0):
            cls.seen = selection, start_percent, end_percent, min_tokens, extra_tokens
            return io.NodeOutput(model)

    node = SimpleNamespace(BlockSparseAttention=BlockSparseAttention)
    monkeypatch.setitem(sys.modules, attentions.NODE, node)
    monkeypatch.setattr(comfy_kitchen, "sol_attn", None, raising=False)
    options = {"transformer_options": {}}
    model = SimpleNamespace(load_device=torch.device("cuda"), model_options=options)
    model.clone = lambda: model
    assert attentions.sol_attn(model, None) is model
    assert BlockSparseAttention.seen == ({"selection": "sla", "keep_percent": 30.0}, 0.2, 1.0, 12288, 0)
    assert attentions.sol_attn(model, None, by_tau=True) is model
    assert BlockSparseAttention.seen == ({"selection": "sol-attn", "tau": 1.3}, 0.2, 1.0, 12288, 256)


def test_a_backend_of_the_host_stands_in_for_every_attention(comfy):
    from comfyui_paro.bench.paro_bench import attentions, real_models, timeline

    device = torch.device("cpu")
    clock = timeline.Timeline(device)
    with torch.inference_mode():
        loaded = real_models.load(real_models.RUNS["minimax-h3-8"], device, torch.float32, tiny=True)
        expected = real_models.sample(loaded, loaded.patchers, lambda: None)
        model = attentions.backend(loaded.patchers[0], clock, "split")
        clock.begin()
        out = real_models.sample(loaded, [model], clock.step)
        clock.end()
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert clock.parts()["dense_attention"] > 0 and len(clock.step_seconds()) == 8
    with pytest.raises(attentions.Unavailable, match="no attention nothing"):
        attentions.backend(loaded.patchers[0], None, "nothing")
