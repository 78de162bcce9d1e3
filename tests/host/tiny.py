"""Tiny random checkpoints of real architectures, through the host's own loader and sampler. Imports comfy: after boot.

Latent sizes are given as token grids (F, H, W); odd ones are cropped by one latent cell, so that the host has to pad.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.ops
import comfy.sample
import comfy.sd
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.host.identity import identify
from comfyui_paro.paro_runtime.host.patching import last_report, patch_model
from comfyui_paro.paro_runtime.plan.options import query_block
from comfyui_paro.paro_runtime.plan.plan import Plan, Site, SitePlan
from safetensors.torch import save_file

HEADS = 2
LAYERS = 2
TEXT_TOKENS = 7
TEXT_WIDTH = 4096  # Wan's; older hosts cannot detect another


def _fill(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random weights: matrices N(0, 0.05), so that attention is not flat; norms and scales one."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in module.state_dict().items():
        one = value.dim() == 1 and name.endswith(("weight", "scale"))
        noise = torch.randn(value.shape, generator=generator) * 0.05
        state[name] = torch.ones_like(noise) if one else noise
    return state


def build_wan(path: Path, model_type: str = "t2v", **changes: Any) -> Path:
    """Save a two-layer, two-head Wan."""
    from comfy.ldm.wan.model import WanModel

    values = {"dim": 128 * HEADS, "ffn_dim": 128, "num_layers": LAYERS, "num_heads": HEADS, "freq_dim": 256}
    values |= {"text_dim": TEXT_WIDTH, "in_dim": 16, "out_dim": 16} | changes
    model = WanModel(model_type=model_type, device="cpu", operations=comfy.ops.disable_weight_init, **values)
    save_file(_fill(model), path)
    return path


def build_flux(path: Path) -> Path:
    """Save a Flux with one double and two single blocks, two heads."""
    from comfy.ldm.flux.model import Flux

    values = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": TEXT_WIDTH, "mlp_ratio": 4.0}
    values |= {"hidden_size": 128 * HEADS, "num_heads": HEADS, "depth": 1, "depth_single_blocks": LAYERS}
    values |= {"axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "txt_ids_dims": []}
    values |= {"qkv_bias": True, "guidance_embed": True}
    model = Flux(device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init, **values)
    save_file(_fill(model), path)
    return path


def load(path: Path, dtype: torch.dtype | None = None) -> Any:
    """The host's model patcher of a checkpoint; it computes in `dtype`, or in what the host chooses."""
    return comfy.sd.load_diffusion_model(str(path), model_options={} if dtype is None else {"dtype": dtype})


def text(seed: int, batch: int = 1, **extra: Any) -> list:
    """A random conditioning."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens = torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    return [[tokens, {"pooled_output": torch.randn(batch, 64, generator=generator), **extra}]]


def latent(grid: tuple[int, int, int], batch: int = 1, video: bool = True) -> torch.Tensor:
    """Zeros of the latent size that gives this token grid."""
    f, h, w = grid
    size = (2 * h - h % 2, 2 * w - w % 2)
    return torch.zeros(batch, 16, *((f, *size) if video else size))


@torch.inference_mode()  # as the server runs every node
def sample(
    model: Any,
    grid: tuple[int, int, int],
    *,
    steps: int = 3,
    cfg: float = 3.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    batch: int = 1,
    seed: int = 0,
    video: bool = True,
    callback: Any = None,
    prompts: tuple[list, list] | None = None,
    **extra: Any,
) -> torch.Tensor:
    """The host's sampler over `prompts` (positive, negative), else over random ones, the positive with `extra`."""
    empty = latent(grid, batch, video)
    # As the host's prepare_noise, which seeds the generator that all threads share.
    noise = torch.randn(empty.size(), dtype=empty.dtype, generator=torch.Generator().manual_seed(seed))
    positive, negative = prompts or (text(1, **extra), text(2))
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive,
        negative,
        empty,
        callback=callback,
        disable_pbar=True,
        seed=seed,
    )


def patched(model: Any, *, plan: Plan | None = None, store: Any = None, said: list | None = None, **settings: Any):
    """The model under PARO with these settings; strict, and however short its sequences, unless told otherwise. Plans
    are remembered where there is a store for them."""
    show, remember = None if said is None else said.append, settings.pop("remember", store is not None)
    settings = Settings(**{"strict": True, "min_tokens": 0, **settings})
    return patch_model(model, settings, plan=plan, store=store, remember=remember, on_status=show)


def full_plan(model: Any, family: str, layout: TokenLayout, order: str, sites: list[Site]) -> Plan:
    """A plan that keeps every block, with one order for all heads."""
    block_q = query_block(layout.grid_tokens)
    blocks = (-(-layout.grid_tokens // block_q), -(-layout.grid_tokens // 64))
    mask = torch.ones(HEADS, *blocks, dtype=torch.bool)
    entry = SitePlan.create([order] * HEADS, mask, None, torch.ones(HEADS))
    return Plan(identify(model, family), layout, block_q, dict.fromkeys(sites, entry))


def wan_sites() -> list[Site]:
    return [Site("double", i) for i in range(LAYERS)]


def flux_sites() -> list[Site]:
    return [Site("double", 0), *(Site("single", i) for i in range(LAYERS))]


report = last_report
