"""Recognise shape, direction and background of clips by moments and templates: the task metric of tiny-Wan.

No trained part, so the rates measure the clips, not a classifier's taste. On rendered (true) clips the
matcher itself is right in the share of cases that the model card states; that is the ceiling of the sampled
rates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import BACKGROUNDS, DIRECTIONS, SHAPES, signed_distance

# Area of each shape at radius 1 (circle, square, triangle, cross), from the distances in `signed_distance`.
AREAS = (3.1416, 2.89, 1.871, 2.31)


def background_of(video: Tensor) -> tuple[Tensor, Tensor]:
    """Background class index `[B]` and image `[B, H, W]` of videos `[B, T, H, W]`.

    The image is the lower quartile over time (the object is brighter than its background and moves). The
    class is the simplest of constant, row profile and column profile that explains it, else checker.
    """
    image = torch.quantile(video, 0.25, dim=1)
    small = F.avg_pool2d(image[:, None], 4)[:, 0]
    rows, cols = small.median(dim=2).values, small.median(dim=1).values
    # What is left without the row (column) medians, as a median of absolute values: robust to the object.
    left = small.new_zeros(3, small.shape[0])
    flat = small.flatten(1).median(dim=1).values[:, None, None]
    for i, fit in enumerate((flat, rows[:, :, None], cols[:, None, :])):
        left[i] = (small - fit).abs().flatten(1).median(dim=1).values
    index = torch.where(left[1] < 0.4 * left[0], 1, torch.where(left[2] < 0.4 * left[0], 2, 3))
    return torch.where(left[0] < 0.035, 0, index), image


def coverage(video: Tensor) -> Tensor:
    """Soft object mask `[B, T, H, W]` in [0, 1]: brighter than halfway from the background to the object."""
    image = torch.quantile(video, 0.25, dim=1)
    bright = torch.quantile(video.flatten(1), 0.985, dim=1)[:, None, None, None]
    # A pixel that the object never leaves has an object-like quartile; the clip's median caps it there.
    cap = torch.maximum(image.flatten(1).median(dim=1).values[:, None, None], bright[:, 0] - 0.5)
    low = torch.minimum(image, cap)[:, None]
    return ((video - low) / (bright - low).clamp_min(0.15)).clamp(0, 1).sub(0.25).div(0.5).clamp(0, 1)


def centroids(cover: Tensor) -> tuple[Tensor, Tensor]:
    """Area `[B, T]` in pixels and centroid `[B, T, 2]` (x, y) of soft masks `[B, T, H, W]`."""
    height, width = cover.shape[-2:]
    area = cover.sum(dim=(2, 3))
    x = (cover.sum(dim=2) * torch.arange(width, device=cover.device)).sum(dim=2)
    y = (cover.sum(dim=3) * torch.arange(height, device=cover.device)).sum(dim=2)
    return area, torch.stack([x, y], dim=2) / area.clamp_min(1.0)[..., None]


def shape_scores(cover: Tensor) -> Tensor:
    """Overlap (soft intersection over union, mean over frames) with each shape's template, `[B, 4]`.

    The template has the mask's area; its centre is searched within 2 pixels of the mask's centroid.
    """
    height, width = cover.shape[-2:]
    area, centre = centroids(cover)
    x = torch.arange(width, device=cover.device, dtype=torch.float32)
    y = torch.arange(height, device=cover.device, dtype=torch.float32)[:, None]
    scores = []
    for shape, unit in enumerate(AREAS):
        r = (area / unit).sqrt()[..., None, None]
        best = torch.zeros_like(area)
        for oy in (-2.0, 0.0, 2.0):
            for ox in (-2.0, 0.0, 2.0):
                dx = x - centre[..., 0, None, None] - ox
                dy = y - centre[..., 1, None, None] - oy
                template = (0.5 - signed_distance(shape, dx, dy, r)).clamp(0, 1)
                both = torch.minimum(template, cover).sum(dim=(2, 3))
                either = torch.maximum(template, cover).sum(dim=(2, 3)).clamp_min(1.0)
                best = torch.maximum(best, both / either)
        scores.append(best.mean(dim=1))
    return torch.stack(scores, dim=1)


def recognise(video: Tensor) -> dict[str, Tensor]:
    """Recognised class indices of videos `[B, T, H, W]`: `shape`, `direction`, `background`, each `[B]`.

    Also `overlap` `[B]` (the winning template's mean intersection over union, 1 is perfect) and `centre`
    `[B, T, 2]` in pixels. The direction is the quadrant of the motion over the first two frames.
    """
    video = video.float()
    background, _ = background_of(video)
    cover = coverage(video)
    scores = shape_scores(cover)
    _, centre = centroids(cover)
    dx, dy = (centre[:, min(2, centre.shape[1] - 1)] - centre[:, 0]).unbind(1)
    direction = torch.where(dy > 0, torch.where(dx > 0, 0, 1), torch.where(dx > 0, 3, 2))
    return {
        "shape": scores.argmax(dim=1),
        "direction": direction,
        "background": background,
        "overlap": scores.max(dim=1).values,
        "centre": centre,
    }


def rates(video: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares of clips recognised as their label; `labels` int `[B, 3]` (shape, direction, background)."""
    found = recognise(video)
    labels = labels.to(video.device)
    words = ("shape", "direction", "background")
    hits = {name: (found[name] == labels[:, i]).float() for i, name in enumerate(words)}
    result = {name: float(hit.mean()) for name, hit in hits.items()}
    result["all_three"] = float((hits["shape"] * hits["direction"] * hits["background"]).mean())
    result["template_overlap"] = float(found["overlap"].mean())
    return result


def describe(labels: Tensor) -> list[str]:
    """Human-readable prompts of labels `[B, 3]`."""
    return [f"{SHAPES[s]}, {DIRECTIONS[d]}, {BACKGROUNDS[b]}" for s, d, b in labels.tolist()]
