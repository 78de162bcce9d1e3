"""Packed weights, recordings, and the suite `tiny` on packed weights, at toy size."""

import pytest
import torch
from comfyui_paro.bench.large_wan import pack, record
from comfyui_paro.bench.large_wan.bed import LargeBench
from comfyui_paro.bench.large_wan.model import load_large_wan, new_model
from comfyui_paro.bench.large_wan.train import TOY_CONFIG
from comfyui_paro.bench.paro_bench.tiny import Variant

FACTS = {"step": "7", "clips": "70"}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights, the output layer's and biases too."""
    torch.manual_seed(0)
    made = new_model(TOY_CONFIG).state_dict()
    changed = sorted(key for key, value in made.items() if "bias" in key or (value.ndim == 2 and not value.any()))
    return made | {key: torch.randn_like(made[key]) * 0.05 for key in changed}


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "weights.safetensors"
    pack.pack(state, path, FACTS, fraction=0.0)
    return path


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_unpacked_weights_are_within_half_a_step(state, tmp_path, fraction) -> None:
    pack.pack(state, tmp_path / "w", FACTS, fraction)
    found, metadata = pack.unpack(tmp_path / "w")
    assert found.keys() == state.keys() and metadata["step"] == "7"
    for key, value in state.items():
        rows, got = (t.flatten(1) if t.ndim > 1 else t[None] for t in (value, found[key]))
        step = torch.maximum(fraction * rows.square().mean(1).sqrt(), rows.abs().amax(1) / 127)
        # Half precision for what is not coded, and for the steps.
        assert bool(((rows - got).abs() <= 0.51 * step[:, None] + 1e-3 * rows.abs()).all()), key
    errors = pack.relative_errors(state, found)
    assert max(errors.values()) < (0.012 if fraction == 0 else 0.032)


def test_the_finest_step_that_fits_is_taken(state, tmp_path) -> None:
    sizes = {f: pack.pack(state, tmp_path / "w", FACTS, f) for f in (0.0, 0.1, 0.2)}
    assert sizes[0.0] > sizes[0.1] > sizes[0.2]
    assert pack.pack_within(state, tmp_path / "w", FACTS, sizes[0.1]) == 0.1
    assert (tmp_path / "w").stat().st_size == sizes[0.1]
    with pytest.raises(ValueError, match="no step"):
        pack.pack_within(state, tmp_path / "w", FACTS, 1000)


def test_what_cannot_be_packed_is_refused(state, tmp_path) -> None:
    for key, at, message in ((pack.TEXT_TABLE, (0, 400), "beyond the vocabulary"), ("head.head.bias", (0,), "finite")):
        changed = state | {key: state[key].clone()}
        changed[key][at] = torch.inf if message == "finite" else 1.0
        with pytest.raises(ValueError, match=message):
            pack.pack(changed, tmp_path / "w", FACTS, 0.0)


def test_a_recording_comes_back_and_is_what_the_model_computed(weights, tmp_path) -> None:
    model = load_large_wan(weights)
    found = record.record(model, (2, 3, 4), 5, layers=[1], steps=[0, 3], heads=[0])
    assert [(one.layer, one.step, one.q.shape) for one in found] == [(1, 0, (1, 1, 24, 128)), (1, 3, (1, 1, 24, 128))]
    assert found[0].sigma == 1.0 > found[1].sigma > 0
    size = record.save(found, tmp_path / "r", record.facts_of("7", 5))
    assert size < 2 * 24 * 768 + 4000
    for one, other in zip(found, record.load(tmp_path / "r"), strict=True):
        assert (one.layer, one.step, one.sigma, one.heads, one.grid) == (
            (other.layer, other.step, other.sigma, other.heads, other.grid)
        )
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in "qkv")
        assert one.q.dtype == torch.float16 and not torch.equal(one.q, one.k)


@pytest.mark.parametrize("plan", ["passing", "radial"])
def test_the_suite_runs_on_this_bed(weights, plan) -> None:
    bench = LargeBench((4, 8, 10), weights, seeds=(7, 8))
    assert (bench.layers, bench.heads, bench.steps) == (2, 1, 20)
    variant = Variant("some", 0.5, 3, plan=plan, tail=plan == "passing", refresh=plan == "passing")
    found = bench.run(variant)
    assert found["grid"] == "4x8x10" and len(found["psnr_each"]) == 2 and found["psnr"] > 10
    dense = bench.sample(bench.seeds, bench.session(variant, plan=None), apart=False)
    assert dense.shape == (2, 16, 4, 16, 20)
