"""Tiny random models of every supported architecture through the host's own classes and sampler. Imports comfy."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.nested_tensor
import comfy.sample
import comfy.supported_models
import comfyui_version
import torch

from .cases import Case, Run


def known(case: Case) -> bool:
    """Whether this host has the architecture."""
    return hasattr(comfy.supported_models, case.config)


def runs(case: Case) -> list[Run]:
    """The runs that this host can do."""
    version = tuple(int(n) for n in comfyui_version.__version__.split(".")[:3])
    return [run for run in case.runs if version >= run.since]


def build(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A model patcher over a new model with random weights that computes in `dtype` on `device`."""
    config = getattr(comfy.supported_models, case.config)(dict(case.unet))
    config.set_inference_dtype(dtype, None)
    config.custom_operations = None
    model = config.get_model({}, "", device=case.device)
    prepare = case.prepare or (lambda _: None)
    prepare(model.diffusion_model)
    if case.device == "meta":
        model.diffusion_model.to_empty(device="cpu")
        for value in model.diffusion_model.buffers():
            if value.is_floating_point():  # position tables: any finite values will do, garbage now and then is NaN
                torch.nn.init.uniform_(value)
        prepare(model.diffusion_model)
    fill(model.diffusion_model)
    where = torch.device(device)
    return comfy.model_patcher.ModelPatcher(model.to(where), load_device=where, offload_device=where)


def fill(model: torch.nn.Module) -> None:
    """Matrices N(0, 0.05), so that attention is not flat; norms and scales one; buffers are left as they are."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if value.dim() == 1 and name.endswith(("weight", "scale")):
            torch.nn.init.ones_(value)
        else:
            value.data = (torch.randn(value.shape, generator=generator) * 0.05).to(value.dtype)


def latent(shape: tuple, batch: int = 1) -> Any:
    """Zeros; of several shapes a packed latent. batch: how many of the first size, which is 1."""
    if isinstance(shape[0], tuple):
        return comfy.nested_tensor.NestedTensor([latent(s, batch) for s in shape])
    return torch.zeros(batch * shape[0], *shape[1:])


def prompt(case: Case, seed: int, **extra: Any) -> list:
    """A random conditioning of the case's text shape."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, *case.text, generator=generator)
    pooled = torch.randn(1, case.pooled, generator=generator)
    return [[tokens, {"pooled_output": pooled, **case.always(), **extra}]]


def sample(
    model: Any, case: Case, run: Run, positive: list | None = None, *, steps: int = 2, batch: int = 1
) -> torch.Tensor:
    """A few steps of the host's sampler; the streams of a packed latent come back as one flat tensor."""
    empty = latent(run.shape, batch)
    out = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, 0),
        steps,
        case.cfg,
        "euler",
        "simple",
        positive or prompt(case, 1, **run.extra()),
        prompt(case, 2, **run.extra()),
        empty,
        disable_pbar=True,
        seed=0,
    )
    return torch.cat([t.flatten() for t in out.unbind()]) if getattr(out, "is_nested", False) else out
