"""Seeded Euler sampler of the flow-matching model, with an attention hook and optional guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from .model import AttentionFn, TinyWan


def sigmas(steps: int = 8, shift: float = 3.0) -> Tensor:
    """Noise levels `[steps + 1]` from 1 to 0: linspace x mapped to shift * x / (1 + (shift - 1) * x)."""
    x = torch.linspace(1, 0, steps + 1)
    return shift * x / (1 + (shift - 1) * x)


def seeded_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise fp32 drawn on the CPU, so that every device starts from the same latent."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(
    model: TinyWan,
    context: Tensor,
    size: tuple[int, int, int],
    *,
    steps: int = 8,
    shift: float = 3.0,
    cfg: float = 1.0,
    seed: int = 0,
    noise: Tensor | None = None,
    attention: AttentionFn | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Sample latents `[B, 16, T, H', W']` for `context` `[B, L, 4096]`.

    `size` is the latent size (T, H', W'). With `cfg` != 1 conditional and unconditional rows run as one batch
    (conditional first). `attention(q, k, v, *, layer)` replaces every self-attention; `on_step(i, sigma)` is
    called before step i. Computes in the model's dtype; the Euler state stays fp32.
    """
    weight = model.head.head.weight
    device, dtype = weight.device, weight.dtype
    batch = context.shape[0]
    if noise is None:
        noise = seeded_noise((batch, 16, *size), seed)
    x = noise.to(device=device, dtype=torch.float32)
    context = context.to(device=device, dtype=dtype)
    if cfg != 1.0:
        context = torch.cat([context, torch.zeros_like(context)])
    levels = sigmas(steps, shift)
    for i in range(steps):
        sigma, following = float(levels[i]), float(levels[i + 1])
        if on_step is not None:
            on_step(i, sigma)
        inputs = torch.cat([x, x]) if cfg != 1.0 else x
        t = torch.full((inputs.shape[0],), 1000.0 * sigma, device=device)
        velocity = model(inputs.to(dtype), t, context, attention).float()
        if cfg != 1.0:
            cond, uncond = velocity.chunk(2)
            velocity = uncond + cfg * (cond - uncond)
        x = x + (following - sigma) * velocity
    return x
