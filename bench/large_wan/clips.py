"""Real clips, which are held out: frames of a video file cut to an array, and arrays read as latents."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .codec import encode
from .data import CELL

SIDE = 240  # of the largest grids that are trained


def cut(video: Path, path: Path, frames: int, every: int, skip: int) -> tuple[int, ...]:
    """Write `frames` frames of a video, one in `every` after `skip`, as uint8 `[T, H, W, 3]`; returns that shape.

    Frames are made smaller until the shorter side is at most SIDE pixels. Needs PyAV (`pip install av`). Raises
    ValueError for a video that is too short.
    """
    import av

    found = []
    with av.open(str(video)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number >= skip and (number - skip) % every == 0:
                zoom = min(1.0, SIDE / min(frame.width, frame.height))
                size = {"width": round(zoom * frame.width), "height": round(zoom * frame.height)}
                found.append(frame.to_ndarray(format="rgb24", **size))
            if len(found) == frames:
                break
    if len(found) < frames:
        raise ValueError(f"{video}: only {len(found)} of {frames} frames")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.stack(found))
    return np.stack(found).shape


def fit(frames: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """uint8 `[T', H, W, 3]` -> `[1, T, 3, 8h, 8w]` in [-1, 1]: the first T frames, the largest central part.

    Raises ValueError if there are fewer than T frames.
    """
    if len(frames) < grid[0]:
        raise ValueError(f"{len(frames)} frames, {grid[0]} are needed")
    height, width = CELL * grid[1], CELL * grid[2]
    video = frames[: grid[0]].permute(0, 3, 1, 2).float() / 127.5 - 1
    zoom = max(height / video.shape[2], width / video.shape[3])
    size = [max(need, round(zoom * have)) for need, have in zip((height, width), video.shape[2:], strict=True)]
    video = F.interpolate(video, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[None, :, :, top : top + height, left : left + width]


def load_clips(folder: Path | None, grid: tuple[int, int, int]) -> list[Tensor]:
    """Latents `[1, 16, T, 2h, 2w]` of all arrays (`*.npy`, see `cut`) of a folder, by name; none without a folder."""
    paths = [] if folder is None else sorted(folder.glob("*.npy"))
    if folder is not None and not paths:
        raise FileNotFoundError(f"{folder}: no .npy files")
    return [encode(fit(torch.from_numpy(np.load(path)), grid)) for path in paths]
