"""Flow matching: the loss that is trained, and the loss on clips held out with right, exchanged and other prompts.

x_s = (1 - s) x + s noise, target noise - x, mean squares (Lipman et al. 2023, arXiv 2210.02747).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .data import make_batch
from .textures import Photos
from .words import CAMERAS, MOTIONS, TEXT_DIM, TOKENS, contexts

SHIFT = 5.0
"""Shift of the noise levels (Esser et al. 2024, arXiv 2403.03206), in training and sampling. Wan's own are 3 to 8."""
UNCONDITIONAL = 0.1
HELD_OUT_SIGMAS = (0.3, 0.6, 0.8, 0.9, 0.95, 0.98)
# (token grid, clips): the first two are of sizes that are trained, on seeds that are not.
HELD_OUT = (((8, 12, 12), 16), ((16, 20, 20), 2))
HELD_OUT_SEED = 2**40


def draw_sigmas(batch: int, generator: torch.Generator) -> Tensor:
    """Noise levels `[batch]` in (0, 1): SHIFT u / (1 + (SHIFT - 1) u), u logistic-normal, one in ten uniform."""
    device = generator.device
    u = torch.sigmoid(torch.randn(batch, generator=generator, device=device))
    flat, choice = torch.rand(2, batch, generator=generator, device=device)
    u = torch.where(choice < 0.1, flat, u)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def loss(model: nn.Module, clean: Tensor, sigma: Tensor, noise: Tensor, context: Tensor) -> Tensor:
    """Mean squares of each clip `[B]`; latents `[B, 16, T, H', W']`, levels `[B]`, prompts `[B, L, 4096]`."""
    level = sigma[:, None, None, None, None]
    with torch.autocast(clean.device.type, dtype=torch.bfloat16):
        velocity = model((1 - level) * clean + level * noise, 1000 * sigma, context)
    return (velocity.float() - (noise - clean)).square().flatten(1).mean(1)


def training_loss(
    model: nn.Module, batch: int, grid: tuple[int, int, int], photos: Photos, generator: torch.Generator
) -> Tensor:
    """The mean over a batch of fresh clips; one prompt in ten is zero."""
    made = make_batch(batch, grid, generator, photos)
    clean, device = made.latent(), generator.device
    named = torch.rand(batch, generator=generator, device=device) >= UNCONDITIONAL
    sigma = draw_sigmas(batch, generator)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    return loss(model, clean, sigma, noise, made.contexts() * named[:, None, None]).mean()


@torch.no_grad()
def held_out(
    model: nn.Module,
    device: torch.device,
    photos: Photos,
    real: Sequence[Tensor] = (),
    clips: Sequence[tuple[tuple[int, int, int], int]] = HELD_OUT,
) -> dict[str, dict[str, list[float]]]:
    """Loss at HELD_OUT_SIGMAS on clips that are never trained, by name of the set and of the prompt.

    Prompts: `right`; `other motion`, every word of motion and of the camera exchanged for the next; `other clip`; for
    `real` latents `[1, 16, T, H', W']`, `none`. How far the wrong prompts lie above the right one says how much it
    matters.
    """
    result = {}
    for grid, batch in clips:
        # Drawn on the CPU, so that every device is asked the same.
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        made = make_batch(batch, grid, generator, Photos(photos.images.cpu()))
        scene, objects = made.scene.clone(), made.objects.clone()
        scene[:, 0] = (scene[:, 0] + 1) % len(CAMERAS)
        there = objects[..., 3] >= 0
        objects[..., 3] = torch.where(there, (objects[..., 3] + 1) % len(MOTIONS), -1)
        prompts = {
            "right": made.contexts(),
            "other motion": contexts(scene, objects),
            "other clip": made.contexts().roll(1, 0),
        }
        result["x".join(map(str, grid))] = _by_prompt(model, made.latent(), prompts, generator, device)
    for number, clean in enumerate(real):
        generator = torch.Generator().manual_seed(HELD_OUT_SEED + 1)
        prompts = {"none": torch.zeros(len(clean), TOKENS, TEXT_DIM)}
        result[f"real {number}"] = _by_prompt(model, clean.cpu(), prompts, generator, device)
    return result


def _by_prompt(
    model: nn.Module, clean: Tensor, prompts: dict[str, Tensor], generator: torch.Generator, device: torch.device
) -> dict[str, list[float]]:
    noise = torch.randn(clean.shape, generator=generator).to(device)
    clean, found = clean.to(device), {}
    for name, context in prompts.items():
        losses = []
        for level in HELD_OUT_SIGMAS:
            sigma = torch.full((len(clean),), level, device=device)
            losses.append(loss(model, clean, sigma, noise, context.to(device)).mean())
        found[name] = [round(value, 5) for value in torch.stack(losses).tolist()]
    return found


def mean_loss(levels: Sequence[float]) -> float:
    """One figure for a list over HELD_OUT_SIGMAS; NaN for an empty one."""
    return sum(levels) / len(levels) if levels else math.nan
