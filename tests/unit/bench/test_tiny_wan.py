"""The tiny trained model: sizes and keys, latents, seeds, the hook, and that its samples are what was asked for."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfyui_paro.tests.tiny_wan import data, recognise
from comfyui_paro.tests.tiny_wan.model import TinyWan, load_tiny_wan, rope_table
from comfyui_paro.tests.tiny_wan.sampler import sample, seeded_noise, sigmas
from safetensors import safe_open

FOLDER = Path(data.__file__).parent


@pytest.fixture(scope="module")
def model() -> TinyWan:
    return load_tiny_wan()


def forward(model: TinyWan, size: tuple[int, int, int], attention=None) -> torch.Tensor:
    x = seeded_noise((2, 16, *size), 3)
    return model(x, torch.tensor([700.0, 31.0]), data.contexts(torch.tensor([[0, 1, 2], [3, 2, 1]])), attention)


def test_committed_file_has_the_keys_and_size_of_a_tiny_wan() -> None:
    path = FOLDER / "paro-tiny-wan.safetensors"
    assert path.stat().st_size <= 10_000_000
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    assert len(tensors) == 123
    assert sum(t.numel() for t in tensors.values()) == 4_843_840
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in TinyWan().state_dict().items()}
    assert tensors["head.modulation"].shape == (1, 2, 256)
    assert tensors["patch_embedding.weight"].shape == (256, 16, 1, 2, 2)


def test_metrics_beside_the_file_say_how_it_was_made() -> None:
    metrics = json.loads((FOLDER / "paro-tiny-wan.json").read_text())
    assert {"seed", "steps", "videos", "loss_final", "seconds", "device", "torch", "date"} <= metrics.keys()


@pytest.mark.parametrize("size", [(1, 2, 2), (4, 8, 6), (3, 7, 9)], ids=str)
def test_forward_keeps_the_latent_shape(model: TinyWan, size: tuple[int, int, int]) -> None:
    out = forward(model, size)
    assert out.shape == (2, 16, *size)
    assert out.isfinite().all()


def test_odd_sizes_are_padded_circularly(model: TinyWan) -> None:
    x = seeded_noise((1, 16, 2, 5, 7), 0)
    wide = F.pad(x, (0, 1, 0, 1, 0, 0), mode="circular")
    assert torch.equal(wide[..., 5, :7], x[..., 0, :])
    t, context = torch.tensor([500.0]), data.context_for("circle", 0, 0)
    assert torch.equal(model(x, t, context), model(wide, t, context)[..., :5, :7])


def test_patches_go_through_the_convolution_they_are_stored_as(model: TinyWan) -> None:
    x = seeded_noise((1, 16, 2, 4, 6), 0)
    patches = x.reshape(1, 16, 2, 2, 2, 3, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(1, 12, 64)
    linear = F.linear(patches, model.patch_embedding.weight.flatten(1), model.patch_embedding.bias)
    torch.testing.assert_close(linear, model.patch_embedding(x).flatten(2).mT, atol=1e-5, rtol=1e-5)


def test_rope_rotates_each_axis_in_its_own_channels() -> None:
    table = rope_table((3, 4, 5))
    assert table.shape == (60, 64, 2)
    token = table[(2 * 4 + 1) * 5 + 3]  # f = 2, h = 1, w = 3; slots 0..21 are F, 22..42 H, 43..63 W
    for slot, angle in (
        (0, 2.0),
        (1, 2 * 10000 ** (-2 / 44)),
        (22, 1.0),
        (23, 10000 ** (-2 / 42)),
        (43, 3.0),
    ):
        expected = torch.tensor([torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))])
        torch.testing.assert_close(token[slot], expected)


def test_hook_sees_every_layer_once_and_replaces_its_output(model: TinyWan) -> None:
    seen = []

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int) -> torch.Tensor:
        seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return F.scaled_dot_product_attention(q, k, v)

    size = (3, 6, 8)
    assert torch.equal(forward(model, size, record), forward(model, size))
    assert seen == [(layer, *[(2, 2, 36, 128)] * 3) for layer in range(4)]
    assert not torch.equal(forward(model, size, lambda q, k, v, *, layer: v), forward(model, size))


def test_decode_undoes_encode_and_the_host_format_is_undone() -> None:
    generator = torch.Generator().manual_seed(0)
    video = data.render(data.draw_clips(3, 40, 56, generator), 5, 40, 56)
    assert video.shape == (3, 5, 40, 56) and float(video.abs().max()) <= 1
    latent = data.encode(video)
    assert latent.shape == (3, 16, 5, 10, 14)
    torch.testing.assert_close(data.decode(latent), video, atol=1e-6, rtol=0)
    assert float(latent[0, 4 * 2 + 3, 1, 5, 6]) == pytest.approx(1.5 * float(video[0, 1, 4 * 5 + 2, 4 * 6 + 3]))
    torch.testing.assert_close(data.from_host_latent(data.to_host_latent(latent)), latent, atol=1e-5, rtol=0)


def test_words_are_fixed_and_names_mean_indices() -> None:
    table = data.text_table()
    assert table.shape == (12, 4096)
    assert table[0, :3].tolist() == pytest.approx([0.507158, -0.139781, 0.009846], abs=1e-5)
    named = data.context_for("triangle", "left-up", "checker")
    assert torch.equal(named, data.contexts(torch.tensor([[2, 2, 3]])))
    assert torch.equal(named[0], table[[2, 6, 11]])


def test_drawn_clips_move_in_their_direction_and_the_matcher_sees_it() -> None:
    labels = torch.arange(64)[:, None] // torch.tensor([1, 4, 16]) % 4
    clips = data.draw_clips(64, 64, 64, torch.Generator().manual_seed(1), labels)
    rates = recognise.rates(data.render(clips, 8, 64, 64), labels)
    assert rates["direction"] == 1.0
    assert rates["shape"] >= 0.9 and rates["background"] >= 0.9


def test_sigmas_run_from_one_to_zero_with_the_shift() -> None:
    levels = sigmas(8, 3.0)
    assert levels[0] == 1 and levels[-1] == 0 and bool((levels.diff() < 0).all())
    assert float(levels[4]) == pytest.approx(0.75)


def test_sampling_is_deterministic_and_reports_steps(model: TinyWan) -> None:
    context, steps = data.context_for("square", 0, "flat"), []
    first = sample(model, context, (2, 7, 8), steps=3, seed=5, on_step=lambda i, s: steps.append((i, s)))
    assert torch.equal(first, sample(model, context, (2, 7, 8), steps=3, seed=5))
    assert not torch.equal(first, sample(model, context, (2, 7, 8), steps=3, seed=6))
    assert [i for i, _ in steps] == [0, 1, 2] and steps[0][1] == 1.0


def test_guidance_of_one_row_is_the_mix_of_both_predictions(model: TinyWan) -> None:
    context, noise = data.context_for("cross", 1, "vertical"), seeded_noise((1, 16, 2, 4, 4), 2)
    guided = sample(model, context, (2, 4, 4), steps=1, cfg=3.0, noise=noise)
    t = torch.tensor([1000.0])
    cond, uncond = model(noise, t, context), model(noise, t, data.null_context())
    torch.testing.assert_close(guided, noise - (uncond + 3 * (cond - uncond)), atol=2e-5, rtol=0)


def test_samples_show_the_shape_and_background_that_were_asked_for(model: TinyWan) -> None:
    labels = torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]])
    video = data.decode(sample(model, data.contexts(labels), (8, 16, 16), steps=8, seed=1))
    found = recognise.recognise(video)
    assert int((found["shape"] == labels[:, 0]).sum()) >= 3
    assert int((found["background"] == labels[:, 2]).sum()) >= 3
