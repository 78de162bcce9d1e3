"""Dense sampling, and a picture of what comes out."""

from pathlib import Path

import torch
from torch import Tensor

from ...tests.tiny_wan.sampler import sample, seeded_noise
from ...tests.tiny_wan.sheet import save_sheet
from .codec import decode
from .flow import SHIFT
from .model import load_large_wan
from .scenes import draw_labels
from .words import contexts, describe

STEPS = 20
GUIDANCE = 3.0


def start(seeds: tuple[int, ...] | list[int], grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Prompts `[B, 7, 4096]` and noise `[B, 16, T, 2h, 2w]` on the CPU: each clip's depend on its own seed only."""
    labels = [draw_labels(1, torch.Generator().manual_seed(s), photographs=False) for s in seeds]
    prompts = [contexts(*pair) for pair in labels]
    noise = [seeded_noise((1, 16, grid[0], 2 * grid[1], 2 * grid[2]), s) for s in seeds]
    return torch.cat(prompts), torch.cat(noise)


def prompts_of(seeds: tuple[int, ...] | list[int]) -> list[str]:
    """What `start` asks for, in English."""
    return [describe(*draw_labels(1, torch.Generator().manual_seed(s), photographs=False))[0] for s in seeds]


def save_samples(weights: Path, path: Path, device: str, toy: bool = False) -> None:
    """Sample six clips from packed weights with guidance; a PNG with a row for each and every other frame.

    The prompts go into a text file beside it.
    """
    grid, steps = ((2, 3, 4), 2) if toy else ((16, 16, 16), STEPS)
    seeds = tuple(range(1, 7))
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = load_large_wan(weights, dtype, device)
    context, noise = start(seeds, grid)
    latent = sample(model, context, noise.shape[2:], steps=steps, shift=SHIFT, cfg=GUIDANCE, noise=noise)
    save_sheet(path, decode(latent)[:, ::2])
    path.with_suffix(".txt").write_text("\n".join(prompts_of(seeds)) + "\n", encoding="utf-8")
