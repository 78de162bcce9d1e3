"""Recordings: q, k, v of a few heads in a few steps of a dense sampling, as a small file for tests without a GPU."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...tests.tiny_wan.model import TinyWan
from ...tests.tiny_wan.sampler import sample, sigmas
from .flow import SHIFT
from .samples import STEPS, prompts_of, start


@dataclass(frozen=True)
class Recording:
    """One call: q, k (after norm and rotation) and v fp16 `[1, heads, N, 128]`, N tokens of `grid` with W fastest."""

    layer: int
    step: int
    sigma: float
    heads: tuple[int, ...]
    grid: tuple[int, int, int]
    q: Tensor
    k: Tensor
    v: Tensor


def record(
    model: TinyWan,
    grid: tuple[int, int, int],
    seed: int,
    layers: Iterable[int],
    steps: Iterable[int],
    heads: Iterable[int],
) -> list[Recording]:
    """Sample the clip of `seed` densely and keep these heads of these layers in these of the `STEPS` steps."""
    context, noise = start((seed,), grid)
    layers, steps, heads = set(layers), set(steps), tuple(heads)
    levels, now, found = sigmas(STEPS, SHIFT).tolist(), [0], []

    def attention(q: Tensor, k: Tensor, v: Tensor, *, layer: int) -> Tensor:
        if layer in layers and now[0] in steps:
            tensors = (x[:, list(heads)].half().cpu() for x in (q, k, v))
            found.append(Recording(layer, now[0], levels[now[0]], heads, grid, *tensors))
        return F.scaled_dot_product_attention(q, k, v)

    def on_step(step: int, _: float) -> None:
        now[0] = step

    size = noise.shape[2:]
    sample(model, context, size, steps=STEPS, shift=SHIFT, noise=noise, attention=attention, on_step=on_step)
    return found


def save(recordings: list[Recording], path: Path, metadata: dict[str, str]) -> int:
    """Write recordings as safetensors; returns the file's bytes (768 for each head and token)."""
    tensors, facts = {}, []
    for number, one in enumerate(recordings):
        tensors |= {f"{number}.{name}": getattr(one, name).contiguous() for name in ("q", "k", "v")}
        facts.append({name: getattr(one, name) for name in ("layer", "step", "sigma", "heads", "grid")})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata | {"recordings": json.dumps(facts), "licence": "Apache-2.0"})
    return path.stat().st_size


def load(path: Path) -> list[Recording]:
    """What `save` wrote."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["recordings"])
        tensors = [[file.get_tensor(f"{number}.{name}") for name in ("q", "k", "v")] for number in range(len(facts))]
    return [
        Recording(f["layer"], f["step"], f["sigma"], tuple(f["heads"]), tuple(f["grid"]), *found)
        for f, found in zip(facts, tensors, strict=True)
    ]


def facts_of(weights_step: str, seed: int) -> dict[str, str]:
    """Metadata of a recording: which weights and which clip."""
    return {"weights_step": weights_step, "seed": str(seed), "prompt": prompts_of([seed])[0], "steps": str(STEPS)}
