"""Figures and picture of PARO Compare: against plain references, on fresh random input, whatever the chunks."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from comfyui_paro.bench import metrics
from comfyui_paro.nodes.compare.compare import DIFFERENCE, GAP, clips_of, flicker_of, measure, shrunk, side_by_side
from comfyui_paro.nodes.compare.in_host import CompareError, check, decode

ALL_AT_ONCE = 2**30


@pytest.fixture
def kornia():
    return pytest.importorskip("kornia.metrics", reason="NO kornia: PSNR and SSIM are not tested")


def pair(clips=1, frames=5, height=24, width=28, channels=3, noise=0.1):
    """Two clips that are no more alike than noise lets them, other ones every time; the seed is printed."""
    print("seed", torch.seed())
    reference = torch.rand(clips, frames, height, width, channels)
    return (reference + noise * torch.randn_like(reference)).clamp(0, 1), reference


def for_bench(clips: torch.Tensor) -> torch.Tensor:
    """Frames `[F, C, H, W]` in -1..1, as bench.metrics wants them."""
    return clips.flatten(0, 1).movedim(-1, 1) * 2 - 1


def plain_ssim(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Structural similarity as Wang et al. (2004) write it, every window by itself: frames `[N, H, W, C]` in 0..1."""
    line = np.exp(-np.square(np.arange(11) - 5) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    x, y = (np.lib.stride_tricks.sliding_window_view(each, (11, 11), (1, 2)) for each in (ours, theirs))
    mean_x, mean_y = ((each * weights).sum((-1, -2)) for each in (x, y))
    apart_x, apart_y = x - mean_x[..., None, None], y - mean_y[..., None, None]
    var_x, var_y, cov = (
        (a * b * weights).sum((-1, -2)) for a, b in ((apart_x, apart_x), (apart_y, apart_y), (apart_x, apart_y))
    )
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


@pytest.mark.parametrize("size", [(1, 5, 24, 28, 3), (2, 3, 11, 40, 1), (3, 1, 33, 12, 4)], ids=str)
def test_figures_agree_with_plain_references(kornia, size):
    ours, theirs = pair(*size)
    found = measure(ours, theirs)
    one, other = (clips.flatten(0, 1).double().numpy() for clips in (ours, theirs))
    errors = np.square(one - other).reshape(len(one), -1).mean(1)
    assert found.psnr == pytest.approx(-10 * np.log10(errors.mean()), abs=1e-3)
    assert found.frames == pytest.approx(list(-10 * np.log10(errors)), abs=1e-3)
    assert found.ssim == pytest.approx(plain_ssim(one, other), abs=1e-3)
    assert found.worst == (int(errors.argmax()) + 1, pytest.approx(-10 * np.log10(errors.max()), abs=1e-3))
    assert not found.identical and not found.missing


def test_values_outside_the_range_are_clamped(kornia):
    ours, theirs = pair()
    assert measure(ours * 3 - 1, theirs).psnr == pytest.approx(measure((ours * 3 - 1).clamp(0, 1), theirs).psnr)


@pytest.mark.parametrize("values", [1, 24 * 28 * 3 * 2, ALL_AT_ONCE])
def test_chunks_change_nothing(kornia, values):
    ours, theirs = pair(clips=2, frames=7)
    whole, calls = measure(ours, theirs, chunk_values=ALL_AT_ONCE), []
    found = measure(ours, theirs, chunk_values=values, between=lambda: calls.append(1))
    assert found.frames == pytest.approx(whole.frames, abs=1e-4)
    for name in ("psnr", "ssim", "flicker"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), abs=1e-5)
    # One chunk of the frames and one of each clip at least, a frame in each at most.
    assert len(calls) == {1: 14 + 2 * 5, ALL_AT_ONCE: 1 + 2}.get(values, 7 + 2 * 3)


def test_no_chunk_is_larger_than_it_may_be(kornia, monkeypatch):
    ours, theirs = pair(frames=9)
    plain, sizes = kornia.ssim, []
    monkeypatch.setattr("kornia.metrics.ssim", lambda a, *rest: (sizes.append(a.numel()), plain(a, *rest))[1])
    frame = ours[0, 0].numel()
    measure(ours, theirs, chunk_values=4 * frame + 1)
    assert sizes == [4 * frame, 4 * frame, frame]


@pytest.mark.parametrize("frames", [2, 3])
def test_between_can_stop_it(kornia, frames):
    ours, theirs = pair(frames=frames)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(ours, theirs, between=stop)


@pytest.mark.parametrize("values", [1, 24 * 28 * 3 * 2, ALL_AT_ONCE])
def test_flicker_is_the_benchs(values):
    ours, theirs = pair(frames=8)
    expected = metrics.flicker(for_bench(ours), for_bench(theirs))
    assert flicker_of(ours, theirs, chunk_values=values) == pytest.approx(expected, abs=1e-5)


def test_flicker_does_not_look_from_one_clip_into_the_next():
    """Two still clips of different brightness: nothing changes within either."""
    still = torch.stack([torch.full((4, 8, 8, 3), 0.2), torch.full((4, 8, 8, 3), 0.8)])
    assert flicker_of(still, still) == 1.0
    moving = still.clone()
    moving[1, 2] = 0.5
    assert flicker_of(moving, still) == math.inf
    assert flicker_of(still[:, :2], still[:, :2]) is None


def test_identical_results(kornia):
    _, same = pair()
    found = measure(same.clone(), same)
    assert found.identical and found.psnr == math.inf and found.ssim == pytest.approx(1) and found.flicker == 1


def test_one_equal_frame_among_others(kornia):
    ours, theirs = pair(frames=3)
    ours[:, 1] = theirs[:, 1]
    found = measure(ours, theirs)
    assert found.frames[1] == math.inf and math.isfinite(found.psnr) and not found.identical


def test_small_frames_and_single_ones(kornia):
    small = measure(*pair(frames=1, height=10))
    assert small.ssim is None and small.flicker is None and math.isfinite(small.psnr)


def test_results_that_are_not_finite_have_no_figures(kornia):
    ours, theirs = pair()
    ours[0, 2, 3, 4, 0] = math.nan
    found = measure(ours, theirs)
    assert found.psnr is None and found.ssim is None and "not finite" in found.missing and not found.identical
    assert side_by_side(theirs, ours, ["a", "b", "c"]).isfinite().all()


def test_without_kornia_the_rest_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.metrics", None)
    ours, theirs = pair()
    found = measure(ours, theirs)
    assert found.psnr is None and found.ssim is None and found.flicker > 0
    assert found.missing.startswith("PSNR and SSIM are left out: kornia cannot be imported")
    assert measure(theirs, theirs).identical


@pytest.mark.parametrize(
    "decoded, latent, expected",
    [
        ((2, 5, 8, 6, 3), (2, 16, 2, 1, 1), (2, 5, 8, 6, 3)),  # a video VAE
        ((10, 8, 6, 3), (2, 16, 2, 1, 1), (2, 5, 8, 6, 3)),  # the same with its clips in a row
        ((5, 8, 6, 3), (1, 16, 2, 1, 1), (1, 5, 8, 6, 3)),
        ((5, 8, 6, 3), (2, 16, 2, 1, 1), (1, 5, 8, 6, 3)),  # not to be divided: one clip
        ((4, 8, 6, 3), (4, 16, 1, 1), (4, 1, 8, 6, 3)),  # pictures
        ((8, 8, 6, 3), (4, 16, 1, 1), (8, 1, 8, 6, 3)),  # more of them than latents
        ((2, 1, 8, 6, 3), (2, 16, 1, 1, 1), (2, 1, 8, 6, 3)),  # pictures of a model with video latents
    ],
)
def test_layouts(decoded, latent, expected):
    frames = torch.rand(decoded)
    clips = clips_of(frames, torch.zeros(latent))
    assert clips.shape == expected and torch.equal(clips.flatten(), frames.flatten())


class Vae:
    """Says what it was given."""

    def decode(self, samples):
        self.given = samples
        return torch.zeros(1, 3, 8, 8, 3)


class Nested:
    """As the host has latents of several kinds."""

    is_nested = True

    def __init__(self, *tensors):
        self.unbind = lambda: list(tensors)


def test_of_a_latent_with_sound_the_picture_is_decoded():
    vae, video, sound = Vae(), torch.zeros(1, 16, 3, 1, 1), torch.zeros(1, 8, 40)
    assert decode(vae, {"samples": Nested(video, sound)}).shape == (1, 3, 8, 8, 3) and vae.given is video
    assert decode(vae, {"samples": video}).shape == (1, 3, 8, 8, 3)


def test_sound_alone_is_refused():
    with pytest.raises(ValueError, match="neither pictures nor a video"):
        clips_of(torch.zeros(1, 2, 500), torch.zeros(1, 8, 40))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_side_by_side(channels):
    ours, theirs = pair(clips=2, frames=2, height=16, width=40, channels=channels, noise=0.03)
    made = side_by_side(theirs, ours, ["first  1.0 s", "second  2.0 s", "difference"])
    strip = made.shape[1] - 16
    assert made.shape == (4, strip + 16, 3 * 40 + 2 * GAP, 3) and made.dtype == torch.float32
    assert made.shape[1] % 2 == made.shape[2] % 2 == 0  # as video codecs want it
    first, second, third = (made[:, strip:, start : start + 40] for start in (0, 40 + GAP, 2 * (40 + GAP)))

    def rgb(clips):
        frames = clips.flatten(0, 1)
        return frames.expand(-1, -1, -1, 3) if channels == 1 else frames[..., :3]

    assert torch.equal(first, rgb(theirs)) and torch.equal(second, rgb(ours))
    assert torch.allclose(third, ((rgb(ours) - rgb(theirs)).abs() * DIFFERENCE).clamp(0, 1))
    for start in (0, 40 + GAP, 2 * (40 + GAP)):  # every panel has its label
        assert made[0, :strip, start : start + 40].std() > 0.01
    assert made.min() >= 0 and made.max() <= 1


def test_shrunk():
    pictures = torch.rand(3, 20, 60, 3)
    assert shrunk(pictures, 60) is pictures
    small = shrunk(pictures, 30)
    assert small.shape == (3, 10, 30, 3) and torch.allclose(small.mean(), pictures.mean(), atol=1e-5)


class Model:
    """A host model as far as `check` looks."""

    def __init__(self, attachment=None):
        self.get_attachment = lambda key: attachment


def test_what_cannot_be_compared_is_refused_in_one_sentence():
    with pytest.raises(CompareError, match="put PARO Patch Model before it") as error:
        check(Model(), Vae())
    assert "\n" not in str(error.value)
    with pytest.raises(CompareError, match="nothing to compare: no such family"):
        check(Model("no such family"), Vae())
