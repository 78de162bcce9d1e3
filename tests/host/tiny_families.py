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


def build(case: Case) -> Any:
    """A model patcher over a new model with random weights."""
    config = getattr(comfy.supported_models, case.config)(dict(case.unet))
    config.set_inference_dtype(torch.float32, None)
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
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def fill(model: torch.nn.Module) -> None:
    """Matrices N(0, 0.05), so that attention is not flat; norms and scales one; buffers are left as they are."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if value.dim() == 1 and name.endswith(("weight", "scale")):
            torch.nn.init.ones_(value)
        else:
            value.data = torch.randn(value.shape, generator=generator) * 0.05


def latent(shape: tuple) -> Any:
    """Zeros; of several shapes a packed latent."""
    if isinstance(shape[0], tuple):
        return comfy.nested_tensor.NestedTensor([torch.zeros(s) for s in shape])
    return torch.zeros(shape)


def prompt(case: Case, seed: int, **extra: Any) -> list:
    """A random conditioning of the case's text shape."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, *case.text, generator=generator)
    pooled = torch.randn(1, case.pooled, generator=generator)
    return [[tokens, {"pooled_output": pooled, **case.always(), **extra}]]


def sample(model: Any, case: Case, run: Run, positive: list | None = None) -> torch.Tensor:
    """Two steps of the host's sampler; the streams of a packed latent come back as one flat tensor."""
    empty = latent(run.shape)
    out = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, 0),
        2,
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
