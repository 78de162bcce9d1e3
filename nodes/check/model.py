"""What a host model, a latent and a prompt say about its attention calls, without running any of them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.core.layout import TokenLayout
from ...paro_runtime.config.recipes import recipe_for
from ...paro_runtime.host.families import Family, ModelCall, family_of
from ...paro_runtime.report.sentences import say

TEXT_TOKENS = 512
"""Taken for the length of a text that is not connected."""

# Names under which the host's models keep what an attention is like.
_HEADS = ("num_heads", "heads", "n_local_heads", "n_heads", "num_attention_heads")
_HEAD_DIM = ("head_dim", "dim_head", "attention_head_dim", "headdim")
_WIDTH = ("inner_dim", "hidden_size", "dim", "embed_dim")
# Parts beside the blocks, whose attention is another.
_BESIDE = ("refiner", "fusion", "text", "t_embedder", "encoder")


@dataclass(frozen=True)
class ModelSize:
    """layout: of the largest self-attention, None where it is not known; typical: a size of that many tokens as the
    family's recipe names it; sites: attention layers PARO would take, None where that is not known."""

    layout: TokenLayout | None
    typical: TokenLayout | None
    heads: int | None
    head_dim: int | None
    dtype: torch.dtype
    sites: int | None
    notes: tuple[str, ...] = field(default=())


def model_size(model: Any, latent: dict[str, Any] | None, positive: Any) -> ModelSize:
    """Of a host's model patcher, its latent dict and conditioning, each of the latter None where not connected."""
    diffusion = model.model.diffusion_model
    heads, head_dim = attention_size(diffusion)
    notes = [] if heads else ["the model does not tell its heads: usual ones are measured"]
    family = family_of(diffusion)
    layout, sites, typical = None, None, None
    if not isinstance(family, str):
        sites = sites_of(family, diffusion)
        name, tokens = next(iter(recipe_for(family.name).typical.items()))
        side = math.isqrt(tokens)
        typical = TokenLayout(0, (1, side, tokens // side))
        if latent is None:
            reason = "no latent is connected"
        else:
            found, note = layout_of(model, family, latent, positive)
            layout, reason = (None, found) if isinstance(found, str) else (found, "")
            notes += [note] if note else []
        if reason:
            notes.append(
                say(
                    "{reason}: attention is measured at {tokens:,} tokens ({size})",
                    reason=reason,
                    tokens=typical.length,
                    size=name,
                )
            )
    return ModelSize(layout, typical, heads, head_dim, _dtype(model.model), sites, tuple(notes))


def attention_size(diffusion: torch.nn.Module) -> tuple[int | None, int | None]:
    """Heads of the blocks' attention and channels of each, or None twice where the model does not tell."""
    for name, module in diffusion.named_modules():
        if any(word in name for word in _BESIDE):
            continue
        heads = _number(module, _HEADS)
        width = _number(module, _WIDTH)
        head_dim = _number(module, _HEAD_DIM) or (width // heads if heads and width else None)
        if heads and head_dim:
            return heads, head_dim
    return None, None


def sites_of(family: Family, diffusion: torch.nn.Module) -> int | None:
    """Attention layers that PARO would take, or None where the model does not tell."""
    counts = family.counts(diffusion)
    if counts is not None:
        return sum(counts)
    blocks = [
        len(module)
        for name, module in diffusion.named_children()
        if isinstance(module, torch.nn.ModuleList)
        and not any(word in name for word in _BESIDE)
        and any(_number(part, _HEADS) for part in module.modules())
    ]
    # A U-Net's parts are no attention blocks.
    return None if hasattr(diffusion, "input_blocks") else sum(blocks) or None


def layout_of(
    model: Any, family: Family, latent: dict[str, Any], positive: Any
) -> tuple[TokenLayout | str, str | None]:
    """The layout of the largest self-attention calls or a reason why there is none, and a note on what was assumed."""
    latents, shapes = _latents(model, latent)
    call = _call(model, latents, shapes, positive)
    found = family.layout(model.model.diffusion_model, call)
    if not isinstance(found, (str, TokenLayout)):
        found = found[0]
    if positive is None and not isinstance(found, str) and found.prefix + found.suffix:
        return found, f"no prompt is connected: a text of {TEXT_TOKENS} tokens is assumed"
    return found, None


def _latents(model: Any, latent: dict[str, Any]) -> tuple[torch.Tensor, list]:
    """The latent as a model gets it, on the CPU, and the shapes of what is packed in it."""
    import comfy.sample

    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    streams = list(samples.unbind()) if getattr(samples, "is_nested", False) else [samples]
    shapes = [tuple(each.shape) for each in streams]
    if len(streams) == 1:
        return torch.zeros(shapes[0]), shapes
    return torch.zeros(shapes[0][0], 1, sum(math.prod(shape[1:]) for shape in shapes)), shapes


def _call(model: Any, latents: torch.Tensor, shapes: list, positive: Any) -> ModelCall:
    """The evaluation that the host would make: conditions as its own code prepares them."""
    import comfy.sampler_helpers
    import comfy.samplers

    prompt: list[list[Any]] = positive if positive is not None else [[torch.zeros(1, TEXT_TOKENS, 1), {}]]
    text = prompt[0][0]
    plain = {"latent_shapes": shapes} if len(shapes) > 1 else {}
    given = {"latent_image": latents, "denoise_mask": None, "seed": 0, "latent_shapes": shapes}
    prepare = _without_text_part(model.model).extra_conds
    conds = comfy.sampler_helpers.convert_cond(prompt[:1])
    try:
        with torch.no_grad():
            made = comfy.samplers.encode_model_conds(prepare, conds, latents, "cpu", "positive", **given)
    except Exception:
        if positive is not None:
            raise
        # A prompt that is made up lacks what some models want of one; the length of the text is all there is.
        return ModelCall(tuple(latents.shape), tuple(text.shape), plain)
    extra = {name: cond.cond for name, cond in made[0]["model_conds"].items()}
    text = extra.pop("c_crossattn", text)
    extra.pop("c_concat", None)
    return ModelCall(tuple(latents.shape), None if text is None else tuple(text.shape), {**plain, **extra})


def _without_text_part(model: Any) -> Any:
    """A host model over the same weights, whose text goes in as it is: some prepare it with layers of their own, whose
    weights are not loaded now, and none of which changes the text's length."""
    diffusion = model.diffusion_model
    if not hasattr(diffusion, "preprocess_text_embeds"):
        return model
    made, inner = copy.copy(model), copy.copy(diffusion)
    made._modules = dict(model._modules)
    inner.preprocess_text_embeds = lambda text, *args, **kwargs: text
    made.diffusion_model = inner
    return made


def _dtype(model: Any) -> torch.dtype:
    """What the model computes in; older hosts tell what it is stored in, which may be 8 bits."""
    ask = getattr(model, "get_dtype_inference", model.get_dtype)
    found = getattr(model, "manual_cast_dtype", None) or ask()
    return found if found in (torch.float16, torch.bfloat16, torch.float32) else torch.bfloat16


def _number(module: torch.nn.Module, names: tuple[str, ...]) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((each for each in found if type(each) is int and each > 0), None)
