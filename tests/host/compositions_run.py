"""Compositions in the way a run is made: conditioning, sampling, and what the host does with the model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch

from .compositions import DENSE, UNTESTED, row, sampled

CONDITIONING = "conditioning"


@sampled(CONDITIONING, "regional prompts", "two prompts, each with a mask", model="flux")
def regional(bed: Any, paro: Any) -> torch.Tensor:
    mask = torch.zeros(1, *bed.latent().shape[-2:])
    mask[..., :12] = 1
    return bed.sample(paro(bed.model), [*bed.text(1, mask=mask, mask_strength=1.0), *bed.text(3, mask=1 - mask)])


@sampled(
    CONDITIONING,
    "`ConditioningSetArea`",
    "a second prompt for a part of the picture",
    why="each area is a grid of its own",
    model="flux",
    passed="",
)
def area(bed: Any, paro: Any) -> torch.Tensor:
    height, width = bed.latent().shape[-2:]
    return bed.sample(paro(bed.model), [*bed.text(1), *bed.text(3, area=(height, width - 4, 0, 4), strength=1.0)])


@sampled(CONDITIONING, "`ConditioningSetTimestepRange`", "one prompt for the first half of the schedule, then another")
def timesteps(bed: Any, paro: Any) -> torch.Tensor:
    early, late = bed.text(1, start_percent=0.0, end_percent=0.5), bed.text(3, start_percent=0.5, end_percent=1.0)
    return bed.sample(paro(bed.model), [*early, *late])


def _hooked(bed: Any, paro: Any, hooks: Any, seed: int = 1) -> torch.Tensor:
    import comfy.hooks

    return bed.sample(paro(bed.model), comfy.hooks.set_hooks_for_conditioning(bed.text(seed), hooks))


@sampled(CONDITIONING, "hook LoRA", "`CreateHookLora` on the positive prompt: each prompt has weights of its own")
def hook_lora(bed: Any, paro: Any) -> torch.Tensor:
    import comfy.hooks

    return _hooked(bed, paro, comfy.hooks.create_hook_lora(bed.lora(), 1.0, 0.0))


@sampled(CONDITIONING, "hook LoRA with keyframes", "`CreateHookKeyframe`: off in the second half")
def hook_keyframes(bed: Any, paro: Any) -> torch.Tensor:
    import comfy.hooks

    hooks, frames = comfy.hooks.create_hook_lora(bed.lora(), 1.0, 0.0), comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    return _hooked(bed, paro, hooks)


@sampled(CONDITIONING, "conditioning hook with a wrapper", "a `TransformerOptionsHook` that wraps `APPLY_MODEL`",
         changes=False)  # fmt: skip
def hook_options(bed: Any, paro: Any) -> torch.Tensor:
    import comfy.hooks

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        bed.seen.append(1)
        return executor(*args, **kwargs)

    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook({"wrappers": {"apply_model": {"theirs": [wrapper]}}}))
    return _hooked(bed, paro, group)


@sampled(CONDITIONING, "ControlNet", "SDXL, residuals for the U-Net from a tiny control net", model="sdxl")
def controlnet(bed: Any, paro: Any) -> torch.Tensor:
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    from . import tiny_families

    leave_out = ("out_channels", "transformer_depth_output", "use_temporal_attention")
    config = {key: value for key, value in bed.case.unet.items() if key not in leave_out}
    operations = comfy.ops.disable_weight_init
    net = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=operations, device="cpu")
    tiny_families.fill(net)
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    height, width = bed.latent().shape[-2:]
    control.set_cond_hint(torch.rand(1, 3, 8 * height, 8 * width, generator=torch.Generator().manual_seed(7)), 1.0)
    fields = {"control": control, "control_apply_to_uncond": True}
    return bed.sample(paro(bed.model), bed.text(1, **fields), bed.text(2, **fields))


row(
    CONDITIONING,
    "VACE",
    "Wan with its control blocks",
    elsewhere="test_families.py::test_family",
    why="the control blocks are sites of their own",
)


@sampled(CONDITIONING, "inpainting", "`SetLatentNoiseMask`, with `DifferentialDiffusion`")
def inpainting(bed: Any, paro: Any) -> torch.Tensor:
    empty = bed.latent()
    mask = torch.linspace(0, 1, empty.shape[-1]).expand(1, 1, *empty.shape[-2:])
    model = bed.extra("nodes_differential_diffusion").DifferentialDiffusion.execute(paro(bed.model))[0]
    start = torch.randn(empty.shape, generator=torch.Generator().manual_seed(3))
    return bed.sample(model, latent=start, noise_mask=mask)


SAMPLING = "sampling"


@sampled(SAMPLING, "`SamplerCustomAdvanced`", "with `CFGGuider`", changes=False)
def custom_advanced(bed: Any, paro: Any) -> torch.Tensor:
    model = paro(bed.model)
    return bed.guided(bed.guider(model), bed.sigmas(model))


@sampled(SAMPLING, "`DualCFGGuider`", "three prompts")
def dual_cfg(bed: Any, paro: Any) -> torch.Tensor:
    model, nodes = paro(bed.model), bed.extra("nodes_custom_sampler")
    guider = nodes.DualCFGGuider.execute(model, bed.text(1), bed.text(3), bed.text(2), 3.0, 2.0, "regular")[0]
    return bed.guided(guider, bed.sigmas(model))


@sampled(SAMPLING, "`PerpNegGuider`", "three prompts, one of them empty")
def perp_neg(bed: Any, paro: Any) -> torch.Tensor:
    model, nodes = paro(bed.model), bed.extra("nodes_perpneg")
    guider = nodes.PerpNegGuider.execute(model, bed.text(1), bed.text(2), bed.text(3), 3.0, 1.0)[0]
    return bed.guided(guider, bed.sigmas(model))


row(
    SAMPLING,
    "`DualModelGuider`, one model patched",
    "the guider calls its second model with the first one's options",
    why="the second model runs as it was given",
    elsewhere="test_rim.py::test_a_guider_of_two_models_keeps_each_as_it_was_patched",
)


row(
    SAMPLING,
    "`DualModelGuider`, the second model alone patched",
    "the guider calls its second model with the first one's options",
    expected=DENSE,
    why="the host asks nothing of the second model's own options: patch the first one too",
    elsewhere="test_rim.py::test_a_guider_whose_second_model_alone_is_patched_runs_as_without_paro",
)


@sampled(
    SAMPLING,
    "`DualModelGuider`, both patched",
    "two patched models",
    changes=False,
    why="each has a report of its own",
)
def dual_model(bed: Any, paro: Any) -> torch.Tensor:
    nodes = bed.extra("nodes_custom_sampler")
    second, first = paro(bed.another()), paro(bed.model)
    guider = nodes.DualModelGuider.execute(first, bed.text(1), 3.0, second, bed.text(2))[0]
    return bed.guided(guider, bed.sigmas(first))


@sampled(SAMPLING, "`DualModelGuider`, the same model twice", "both places are given one patched model", changes=False)
def dual_model_same(bed: Any, paro: Any) -> torch.Tensor:
    model = paro(bed.model)
    guider = bed.extra("nodes_custom_sampler").DualModelGuider.execute(model, bed.text(1), 3.0, model, bed.text(2))[0]
    return bed.guided(guider, bed.sigmas(model))


@sampled(SAMPLING, "`SplitSigmas`", "two samplers over one schedule, one patched model", changes=False)
def split(bed: Any, paro: Any) -> torch.Tensor:
    model = paro(bed.model)
    high, low = bed.extra("nodes_custom_sampler").SplitSigmas.execute(bed.sigmas(model), 1)
    return bed.guided(bed.guider(model), low, latent=bed.guided(bed.guider(model), high))


row(
    SAMPLING,
    "stages",
    "`KSamplerAdvanced` one after the other, two experts",
    elsewhere=("test_stages.py::test_stages_have_the_sparse_calls_of_the_whole_schedule"),
)
row(
    SAMPLING,
    "core `ModelSamplingSD3`",
    "another schedule for the model, before PARO and after it, in stages",
    elsewhere="test_stages.py::test_a_schedule_of_a_node_behind_paro",
)
row(SAMPLING, "rising sigmas", "unsampling with `FlipSigmas`", elsewhere="test_stages.py::test_rising_sigmas")
row(
    SAMPLING,
    "a sampler with sigmas of its own",
    "restarts, or a schedule that it makes itself",
    elsewhere=("test_stages.py::test_a_sampler_with_sigmas_of_its_own"),
)
row(
    SAMPLING,
    "every sampler of the host",
    "each name that `KSampler` offers",
    elsewhere=("test_composition.py::test_every_sampler"),
)


@sampled(SAMPLING, "upscale between samplers", "latent upscale, then a second sampler at denoise 0.6")
def upscaled(bed: Any, paro: Any) -> torch.Tensor:
    model = paro(bed.model)
    first = bed.sample(model)
    size = (first.shape[2], first.shape[3] + 8, first.shape[4] + 6)
    larger = torch.nn.functional.interpolate(first, size=size, mode="nearest")
    return bed.sample(model, latent=larger, denoise=0.6)


@sampled(SAMPLING, "sizes that change within a run", "a sampler that begins with a smaller picture")
def resized(bed: Any, paro: Any) -> torch.Tensor:
    import comfy.samplers

    def grows(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, **_: Any) -> torch.Tensor:
        full = x.shape[2:]
        x = torch.nn.functional.interpolate(x, size=(full[0], 12, 10))
        for number, (sigma, following) in enumerate(pairwise(sigmas)):
            if number == 2:
                x = torch.nn.functional.interpolate(x, size=full)
            denoised = model(x, sigma * x.new_ones(len(x)), **extra_args)
            x = x + (x - denoised) / sigma * (following - sigma)
        return x

    model = paro(bed.model)
    return bed.guided(bed.guider(model), bed.sigmas(model), comfy.samplers.KSAMPLER(grows))


@sampled(SAMPLING, "tiles within a step", "each step in two overlapping halves, as tiled diffusion does")
def tiles(bed: Any, paro: Any) -> torch.Tensor:
    import comfy.samplers

    def tiled(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, **_: Any) -> torch.Tensor:
        for sigma, following in pairwise(sigmas):
            total, count = torch.zeros_like(x), torch.zeros_like(x)
            for first in (0, x.shape[-1] - 12):
                part = (..., slice(first, first + 12))
                total[part] += model(x[part].contiguous(), sigma * x.new_ones(len(x)), **extra_args)
                count[part] += 1
            x = x + (x - total / count) / sigma * (following - sigma)
        return x

    model = paro(bed.model)
    return bed.guided(bed.guider(model), bed.sigmas(model), comfy.samplers.KSAMPLER(tiled))


@sampled(SAMPLING, "LTX's second stage", "the result upsampled, then a short schedule of its own", model="ltxv")
def second_stage(bed: Any, paro: Any) -> torch.Tensor:
    model = paro(bed.model)
    larger = torch.nn.functional.interpolate(bed.sample(model), scale_factor=(1, 1.5, 1.5))
    return bed.guided(bed.guider(model, 1.0), torch.tensor([0.909, 0.725, 0.42, 0.0]), latent=larger)


HOST = "the host's own handling"


row(HOST, "two PARO nodes in a row", "`PARO Patch Model` twice", why="the second replaces the first; a note says so",
    elsewhere="test_run.py::test_settings_that_do_nothing_are_told")  # fmt: skip


@sampled(HOST, "conditionings split by memory", "each prompt in an evaluation of its own, where both do not fit",
         changes=False)  # fmt: skip
def split_by_memory(bed: Any, paro: Any) -> torch.Tensor:
    model = paro(bed.model)
    with patch.object(type(model.model), "memory_required", lambda self, *args, **kwargs: 1e18):
        return bed.sample(model)


@sampled(HOST, "batch of three", "with guidance")
def batch(bed: Any, paro: Any) -> torch.Tensor:
    return bed.sample(paro(bed.model), latent=bed.latent(batch=3))


@sampled(HOST, "multi-GPU copies", "`MultiGPUCFGSplit`: a thread and a copy of the model for each prompt",
         why="each has a session of its own; two names of one CPU in the tests, not run on two GPUs",
         changes=False)  # fmt: skip
def multi_gpu(bed: Any, paro: Any) -> torch.Tensor:
    import comfy.model_management as management

    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    with patch.object(management, "get_all_torch_devices", lambda exclude_current=False: devices):
        model = bed.extra("nodes_multigpu").MultiGPUCFGSplitNode.execute(paro(bed.model), 2)[0]
        assert len(model.get_additional_models_with_key("multigpu")) == 1
        return bed.sample(model)


@sampled(HOST, "unload and reload", "all models are unloaded between two runs", changes=False)
def reloaded(bed: Any, paro: Any) -> torch.Tensor:
    import comfy.model_management

    model = paro(bed.model)
    first = bed.sample(model)
    comfy.model_management.unload_all_models()
    again = bed.sample(model)
    assert torch.equal(first, again)
    return again


row(
    HOST,
    "interrupt",
    "the host's own, in a dense, an observing, a planning and a sparse step",
    elsewhere=("test_composition.py::test_interrupt"),
)
row(HOST, "dynamic loading", "`ModelPatcherDynamic`, weights that come while the model runs", expected=UNTESTED,
    why="the host uses it on GPUs only")  # fmt: skip
