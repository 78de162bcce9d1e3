"""Two results of one seed: how far they are apart, and both side by side. Clips are `[B, F, H, W, C]` with values in
0..1 (clamped): B clips of F frames each; B pictures where F is 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

DIFFERENCE = 8
"""The picture shows the difference this many times brighter."""

CHUNK_VALUES = 2**22
"""Of each result, worked on at once: SSIM makes about ten tensors of this size (16 MiB each)."""

WINDOW = 11
"""Of SSIM, in pixels."""

GAP = 4
INK, PAPER = (228, 228, 231), (24, 24, 27)


@dataclass(frozen=True)
class Figures:
    """How far a result is from its reference.

    psnr     dB, of the mean squared error of all frames together; infinite for equal results. None: left out.
    frames   dB of every frame.
    ssim     mean over frames; None where left out, or where a frame is smaller than the window.
    flicker  as `bench.metrics.flicker` defines it; None for pictures and clips of fewer than three frames.
    missing  why figures were left out, a sentence; empty where none were.
    """

    identical: bool
    psnr: float | None = None
    frames: tuple[float, ...] = ()
    ssim: float | None = None
    flicker: float | None = None
    missing: str = ""

    @property
    def worst(self) -> tuple[int, float]:
        """Number of the frame with the lowest PSNR, counted from 1, and its dB."""
        number = min(range(len(self.frames)), key=self.frames.__getitem__)
        return number + 1, self.frames[number]


def clips_of(decoded: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """What a VAE made of a latent, `[N, H, W, C]` or `[B, F, H, W, C]`, as clips.

    Of `[N, H, W, C]` the latent says what N is: a video's latent `[B, C, f, h, w]` gave B clips, a picture's
    `[B, C, h, w]` N pictures. ValueError for anything else, sound for example.
    """
    if decoded.ndim == 5:
        return decoded
    if decoded.ndim != 4:
        raise ValueError(f"neither pictures nor a video came out of the VAE, but a tensor of {decoded.ndim} dimensions")
    if latent.ndim != 5:
        return decoded[:, None]
    clips = latent.shape[0] if decoded.shape[0] % latent.shape[0] == 0 else 1
    return decoded.unflatten(0, (clips, -1))


def measure(
    clips: torch.Tensor,
    reference: torch.Tensor,
    *,
    device: torch.device | None = None,
    chunk_values: int = CHUNK_VALUES,
    between: Callable[[], object] = lambda: None,
) -> Figures:
    """The figures of clips against others of the same shape, computed on `device` (theirs by default).

    between is called before every chunk: it may raise, to stop.
    """
    try:
        from kornia.metrics import psnr, ssim
    except Exception as error:  # it is the host's, for its own optional nodes, and fits not every torch
        psnr = ssim = None
        missing = f"PSNR and SSIM are left out: kornia cannot be imported ({type(error).__name__})."
    else:
        missing = ""
    identical, finite, decibels, similar = True, True, [], []
    whole = psnr is not None and min(clips.shape[2:4]) >= WINDOW
    for ours, theirs in _chunks(clips.flatten(0, 1), reference.flatten(0, 1), device, chunk_values, 0):
        between()
        finite = finite and bool(ours.isfinite().all() and theirs.isfinite().all())
        identical = identical and torch.equal(ours, theirs)
        if psnr is not None:
            decibels += [float(psnr(one, other, 1.0)) for one, other in zip(ours, theirs, strict=True)]
        if whole:
            # Without the rim, where the window would reach over the edge, as its authors and scikit-image have it.
            values = ssim(_channels_first(ours), _channels_first(theirs), WINDOW, 1.0, 0.0, "valid")
            similar += values.flatten(1).mean(1).tolist()
    if not finite:
        return Figures(False, missing="No figures: a result holds values that are not finite.")
    pooled = None if psnr is None else _pooled(decibels)
    mean = sum(similar) / len(similar) if similar else None
    flicker = flicker_of(clips, reference, device=device, chunk_values=chunk_values, between=between)
    return Figures(identical, pooled, tuple(decibels), mean, flicker, missing)


def flicker_of(
    clips: torch.Tensor,
    reference: torch.Tensor,
    *,
    device: torch.device | None = None,
    chunk_values: int = CHUNK_VALUES,
    between: Callable[[], object] = lambda: None,
) -> float | None:
    """`bench.metrics.flicker` of clips, a few frames at a time: the mean absolute second difference in time over that
    of the reference. None below three frames."""
    if clips.shape[1] < 3:
        return None
    ours = theirs = 0.0
    for clip, other in zip(clips, reference, strict=True):
        for some, same in _chunks(clip, other, device, chunk_values, 2):
            between()
            ours += some.diff(n=2, dim=0).abs().sum(dtype=torch.float64).item()
            theirs += same.diff(n=2, dim=0).abs().sum(dtype=torch.float64).item()
    if theirs == 0:
        return 1.0 if ours == 0 else float("inf")
    return ours / theirs


def side_by_side(reference: torch.Tensor, clips: torch.Tensor, labels: Sequence[str]) -> torch.Tensor:
    """Every frame as reference | clips | their difference, DIFFERENCE times as bright, under a strip with the three
    labels: float32 `[B*F, strip + H, 3*W + 2*GAP, 3]` in 0..1."""
    theirs, ours = reference.flatten(0, 1), clips.flatten(0, 1)
    frames, height, width = ours.shape[:3]
    strip = label_strip(labels, width).to(ours.device)
    top = strip.shape[0]
    made = strip.new_empty(frames, top + height, strip.shape[1], 3)
    made[:, :top] = strip
    made[:, top:] = strip[0, 0]
    starts = [number * (width + GAP) for number in range(3)]
    # A frame at a time, straight into its place: of a long video there is nothing else of the picture's size.
    for place, one, other in zip(made, theirs, ours, strict=True):
        one, other = _rgb(one), _rgb(other)
        for start, panel in zip(starts, (one, other, (one - other).abs() * DIFFERENCE), strict=True):
            place[top:, start : start + width] = panel.clamp(0, 1)
    return made


def label_strip(labels: Sequence[str], width: int) -> torch.Tensor:
    """One label above each panel of `width` pixels: float32 `[strip, panels * width + gaps, 3]` in 0..1."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont  # the host's own dependency; only pictures need it

    def font_of(size: int):
        try:
            return ImageFont.load_default(size)
        except TypeError:  # Pillow before 10.1 has one size
            return ImageFont.load_default()

    size = max(8, min(32, width // 20))
    # The longest label fits its panel, down to where it could not be read any more.
    while size > 8 and max(font_of(size).getlength(label) for label in labels) > width - 8:
        size -= 1
    font = font_of(size)
    height = size + 10 + size % 2  # even, as video codecs want it
    image = Image.new("RGB", (len(labels) * width + (len(labels) - 1) * GAP, height), PAPER)
    for number, label in enumerate(labels):
        panel = Image.new("RGB", (width, height), PAPER)
        ImageDraw.Draw(panel).text((4, 4), label, INK, font)
        image.paste(panel, (number * (width + GAP), 0))
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)


def shrunk(pictures: torch.Tensor, width: int) -> torch.Tensor:
    """Pictures `[N, H, W, 3]` no wider than `width`, one at a time."""
    if pictures.shape[2] <= width:
        return pictures
    size = (round(pictures.shape[1] * width / pictures.shape[2]), width)
    return torch.cat([_smaller(picture, size) for picture in pictures])


def _smaller(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(picture[None].movedim(-1, 1), size, mode="area").movedim(1, -1)


def _chunks(
    ours: torch.Tensor, theirs: torch.Tensor, device: torch.device | None, values: int, overlap: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Frames `[F, H, W, C]` of both, as float32 in 0..1 on `device`: as many at once as make `values` values, one at
    least, each chunk beginning with the last `overlap` frames of the one before."""
    step = max(1, values // ours[0].numel())
    for start in range(0, len(ours) - overlap, step):
        both = (frames[start : start + step + overlap] for frames in (ours, theirs))
        one, other = (x.to(device=device or x.device, dtype=torch.float32).clamp(0, 1) for x in both)
        yield one, other


def _channels_first(frames: torch.Tensor) -> torch.Tensor:
    """`[N, C, H, W]`; on NVIDIA's GPUs in float64, where float32 convolutions may round to TF32: too coarse for the
    variances of flat areas."""
    return frames.movedim(-1, 1).to(torch.float64 if frames.is_cuda else torch.float32).contiguous()


def _pooled(decibels: list[float]) -> float:
    """PSNR of the mean of the squared errors behind these; infinite where there was no error at all."""
    errors = [10 ** (-each / 10) for each in decibels]
    mean = sum(errors) / len(errors)
    return -10 * math.log10(mean) if mean else math.inf


def _rgb(frame: torch.Tensor) -> torch.Tensor:
    """Three channels of a frame `[H, W, C]`: grey ones repeated, others beyond them left out; not finite is black."""
    frame = frame.float().nan_to_num(0.0)
    return frame.expand(*frame.shape[:2], 3) if frame.shape[-1] == 1 else frame[..., :3]
