"""Clips of the large bed: the same for the same seed, and showing what the prompt says; latents, photographs."""

import math

import pytest
import torch
from comfyui_paro.bench.large_wan import clips, codec, scenes, textures, words
from comfyui_paro.bench.large_wan.data import make_batch

GRID = (4, 6, 8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(camera="fixed", background="clouds", objects=()) -> tuple[torch.Tensor, torch.Tensor]:
    """One clip's labels; objects as (shape, material, colour, motion), the nearest last."""
    scene = [words.CAMERAS.index(camera), words.BACKGROUNDS.index(background), words.COLOURS.index("white")]
    kinds = (words.SHAPES, words.MATERIALS, words.COLOURS, words.MOTIONS)
    rows = [[-1] * 4] * (words.MOST_OBJECTS - len(objects))
    rows += [[names.index(word) for names, word in zip(kinds, one, strict=True)] for one in objects]
    return torch.tensor([scene]), torch.tensor([rows])


def video(*args, **more) -> torch.Tensor:
    return make_batch(1, GRID, seeded(5), labels=labels(*args, **more)).video


def test_a_seed_gives_the_same_clips_again() -> None:
    first, again, other = (make_batch(3, GRID, seeded(seed)) for seed in (1, 1, 2))
    assert first.video.shape == (3, 4, 3, 48, 64) and float(first.video.abs().max()) <= 1
    assert torch.equal(first.video, again.video) and torch.equal(first.contexts(), again.contexts())
    assert not torch.equal(first.video, other.video)


def test_the_camera_goes_where_it_is_told() -> None:
    """Without objects a pan to the left is a pan to the right backwards, and so for the other ways."""
    for there, back in (("pan left", "pan right"), ("pan up", "pan down")):
        clip = video(there)
        torch.testing.assert_close(clip, video(back).flip(1), atol=1e-4, rtol=0)
        assert float((clip - clip.flip(1)).abs().mean()) > 0.01
    assert float((video("fixed") - video("fixed")[:, :1]).abs().max()) == 0
    # What is in the middle of a pan to the right was further right before: the picture moves to the left.
    clip = video("pan right", "waves")[0, :, 0]
    shifts = [float((clip[0, :, 4 + n : -4] - clip[-1, :, 4 : -4 - n]).square().mean()) for n in range(4)]
    assert shifts[3] < shifts[0]


def test_an_object_has_its_colour_and_moves_its_way() -> None:
    empty = video()
    for colour, channel in (("red", 0), ("green", 1), ("blue", 2)):
        clip = video(objects=[("circle", "plain", colour, "right")])
        there = (clip - empty).abs().amax(2) > 0.05
        assert int(clip.movedim(2, 0)[:, there].mean(1).argmax()) == channel
        x = torch.arange(there.shape[-1])
        centre = [float((frame.any(0) * x).sum() / frame.any(0).sum()) for frame in there[0]]
        assert centre[0] < centre[-1]


def test_the_nearest_object_hides_the_others() -> None:
    made = scenes.draw_scenes(*labels(objects=[("circle", "plain", "red", "still")] * 2), 4 / 3, seeded(0))
    made.centre[:] = 0
    made.radius[:] = 0.2
    made.colour[0, -1] = torch.tensor([0.0, 0.0, 1.0])
    clip = scenes.render(made, 1, 48, 64, textures.Photos.none(), seeded(0))
    red, _, blue = (clip[0, 0, :, 24, 32] + 1) / 2
    assert red < 0.01 < 0.5 < blue


@pytest.mark.parametrize("kind", range(6), ids=words.SHAPES)
def test_a_word_changes_its_clip_and_its_token_alone(kind: int) -> None:
    name = words.SHAPES[kind]
    other = words.SHAPES[(kind + 1) % 6]
    pair = [labels(objects=[(shape, "striped", "cyan", "up")]) for shape in (name, other)]
    clips_of = [make_batch(1, GRID, seeded(3), labels=one).video for one in pair]
    assert float((clips_of[0] - clips_of[1]).abs().amax()) > 0.2
    tokens = [words.contexts(*one) for one in pair]
    changed = (tokens[0] != tokens[1]).any(2)[0]
    assert changed.tolist() == [False] * 6 + [True]


def test_tokens_are_sums_of_words_and_zero_for_what_is_not_there() -> None:
    tokens = words.contexts(*labels("zoom in", "bricks", [("ring", "dotted", "blue", "turning")]))[0]
    assert tokens.shape == (7, 4096) and int((tokens[:, words.WORDS :] != 0).sum()) == 0
    assert (tokens != 0).sum(1).tolist() == [1, 2, 0, 0, 0, 0, 4]
    assert words.describe(*labels("zoom in", "bricks", [("ring", "dotted", "blue", "turning")])) == [
        "zoom in; white bricks; blue dotted ring (turning)"
    ]


def test_drawn_clips_have_two_to_five_objects_and_no_photographs_without_any() -> None:
    scene, objects = scenes.draw_labels(400, seeded(0), photographs=False)
    counts = (objects[..., 0] >= 0).sum(1)
    assert counts.unique().tolist() == [2, 3, 4, 5]
    assert int(scene[:, 1].max()) == words.BACKGROUNDS.index("photograph") - 1
    assert int(scenes.draw_labels(400, seeded(0), True)[0][:, 1].max()) == words.BACKGROUNDS.index("photograph")


def test_photographs_are_read_and_shown(tmp_path) -> None:
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (90, 60), (255, 0, 0)).save(tmp_path / "red.png")
    photos = textures.Photos.load(tmp_path, "cpu", side=32)
    assert photos.images.shape == (1, 3, 32, 32)
    clip = make_batch(1, GRID, seeded(0), photos, labels("fixed", "photograph")).video
    assert float(clip[:, :, 0].min()) > 0.8 and float(clip[:, :, 1:].max()) < -0.9
    with pytest.raises(FileNotFoundError):
        textures.Photos.load(tmp_path / "..", "cpu")


def test_the_latent_is_orthonormal_before_its_scale_and_keeps_most_of_a_clip() -> None:
    kernels = codec.basis(torch.zeros(1)).flatten(1)
    torch.testing.assert_close(kernels @ kernels.T, torch.eye(16), atol=1e-6, rtol=0)
    latent = 0.1 * torch.randn(2, 16, 3, 4, 5, generator=seeded(0))
    torch.testing.assert_close(codec.encode(codec.decode(latent)), latent, atol=1e-5, rtol=0)
    clip = make_batch(4, GRID, seeded(0)).video
    error = (codec.decode(codec.encode(clip)) - clip).square().mean()
    assert 10 * math.log10(4 / error) > 28


def test_the_spread_of_the_coefficients_is_as_written() -> None:
    found = codec.coefficients(make_batch(96, (1, 12, 12), seeded(0)).video)
    spread = found.std((0, 2, 3, 4))
    assert bool(((spread / torch.tensor(codec.SPREAD)).log().abs() < 0.2).all())
    assert float(found[:, 0].mean()) == pytest.approx(codec.BRIGHTNESS, abs=0.2)


def test_real_frames_are_cut_to_the_grid(tmp_path) -> None:
    frames = torch.full((5, 50, 120, 3), 255, dtype=torch.uint8)
    frames[..., 0] = 0
    clip = clips.fit(frames, GRID)
    assert clip.shape == (1, 4, 3, 48, 64)
    for channel, value in enumerate((-1.0, 1.0, 1.0)):
        torch.testing.assert_close(clip[:, :, channel], torch.full((1, 4, 48, 64), value), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="5 frames, 9 are needed"):
        clips.fit(frames, (9, 6, 8))
    assert clips.load_clips(None, GRID) == []
