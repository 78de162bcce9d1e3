"""Models of the host at their real sizes with random weights, and whole samplings of them. Imports comfy: after `boot`.

A real model is the tiny one of the host tests with the numbers of a real checkpoint (as the host's `model_detection`
reads them), so that the class, the conditioning and what is left out of it are said once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comfyui_paro.tests.host import cases_image, cases_video
from comfyui_paro.tests.host.cases import Case as TinyCase

_TINY = {case.name: case for case in (*cases_video.CASES, *cases_image.CASES)}


@dataclass(frozen=True)
class RealModel:
    """base: the tiny model; unet: real numbers; text: tokens and channels; note: what differs from the published."""

    base: str
    unet: dict[str, Any]
    text: tuple[int, int]
    pooled: int = 768
    note: str | None = None

    @property
    def tiny(self) -> TinyCase:
        return _TINY[self.base]

    @property
    def case(self) -> TinyCase:
        """As the tests' builder wants it, at its real size."""
        case = replace(self.tiny, unet=self.tiny.unet | self.unet, text=self.text, pooled=self.pooled)
        mask = {"attention_mask": torch.ones(1, self.text[0], dtype=torch.int)}
        return replace(case, always=lambda: mask) if "attention_mask" in case.always() else case


@dataclass(frozen=True)
class WholeRun:
    """One sampling. stages: steps that each model in turn does of one schedule; models of several stages differ in
    their weights. latent: shape, or shapes of a packed one. sigmas: the schedule, where it is not the host's own."""

    model: str
    latent: tuple
    stages: tuple[int, ...]
    cfg: float = 1.0
    sigmas: tuple[float, ...] | None = None
    note: str | None = None

    @property
    def steps(self) -> int:
        return sum(self.stages)


MODELS = {
    "wan14b": RealModel(
        "wan_t2v",
        {"dim": 5120, "ffn_dim": 13824, "num_layers": 40, "num_heads": 40, "text_dim": 4096, "freq_dim": 256},
        (512, 4096),
    ),
    "wan1.3b": RealModel(
        "wan_t2v",
        {"dim": 1536, "ffn_dim": 8960, "num_layers": 30, "num_heads": 12, "text_dim": 4096, "freq_dim": 256},
        (512, 4096),
    ),
    "hunyuan15": RealModel(
        "hunyuan_video15",
        {"context_in_dim": 3584, "hidden_size": 2048, "mlp_ratio": 4.0, "num_heads": 16, "depth": 54}
        | {"byt5": True, "meanflow_sum": True, "vision_in_dim": 1152},
        (256, 3584),
    ),
    "ltx2": RealModel(
        "ltxav",
        {"num_layers": 48, "num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096}
        | {"caption_channels": 3840, "audio_num_attention_heads": 32, "audio_attention_head_dim": 64}
        | {"audio_cross_attention_dim": 2048},
        (1024, 7680),
        note="without the text connectors, which run before the sampling's first step",
    ),
    "minimax_h3": RealModel(
        "minimax_h3",
        {"hidden_size": 5376, "num_layers": 40, "token_refiner_num_layers": 2, "num_attention_heads": 56}
        | {"attention_head_dim": 128, "ffn_hidden_size": 14336, "text_dim": 5120, "timestep_input_dim": 256}
        | {"time_embed_hidden_size": 5376, "time_embed_dim": 2688},
        (256, 5120),
        note="layers: 40 of 50, all of them do not fit into 80 GB in bf16",
    ),
    "flux": RealModel(
        "flux",
        {"vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24}
        | {"depth": 19, "depth_single_blocks": 38},
        (512, 4096),
    ),
    "qwen_image": RealModel(
        "qwen_image", {"num_layers": 60, "num_attention_heads": 24, "joint_attention_dim": 3584}, (256, 3584)
    ),
    "z_image": RealModel(
        "z_image",
        {"dim": 3840, "cap_feat_dim": 2560, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30}
        | {"ffn_dim_multiplier": 8 / 3},
        (256, 2560),
    ),
}

_WAN_480P, _WAN_720P = (1, 16, 21, 60, 104), (1, 16, 21, 90, 160)
_TWO = "two weight sets at once, both on the GPU"
RUNS = {
    "wan14b-480p-20": WholeRun("wan14b", _WAN_480P, (20,)),
    "wan14b-720p-4": WholeRun("wan14b", _WAN_720P, (4,)),
    "wan1.3b-480p-12": WholeRun("wan1.3b", _WAN_480P, (12,), cfg=5.0),
    "wan22-720p-2+2": WholeRun("wan14b", _WAN_720P, (2, 2), note=_TWO),
    "wan22-480p-10+10": WholeRun("wan14b", _WAN_480P, (10, 10), note=_TWO),
    "hunyuan15-720p-4": WholeRun("hunyuan15", (1, 32, 31, 45, 80), (4,)),
    # 1920x1088, 121 frames; the schedule of the published two-stage workflows' second stage.
    "ltx2-stage2": WholeRun(
        "ltx2", ((1, 128, 16, 34, 60), (1, 8, 121, 16)), (3,), sigmas=(0.909375, 0.725, 0.421875, 0.0)
    ),
    # 1344x768, 124 frames with their sound, the smallest length that the model was trained on.
    "minimax-h3-8": WholeRun("minimax_h3", ((1, 24, 37, 48, 84), (1, 32, 2, 207)), (8,)),
    "flux-1024-8": WholeRun("flux", (1, 16, 128, 128), (8,)),
    "flux-2048-8": WholeRun("flux", (1, 16, 256, 256), (8,)),
    "qwen-image-1328-8": WholeRun("qwen_image", (1, 16, 1, 166, 166), (8,)),
    "z-image-1024-8": WholeRun("z_image", (1, 16, 128, 128), (8,)),
    "z-image-1536-8": WholeRun("z_image", (1, 16, 192, 192), (8,)),
}


def boot(host: Path, device: torch.device) -> str:
    """Make `comfy` importable as the host's defaults on such a device are, and return its version. Call once, first."""
    if str(host) not in sys.path:
        sys.path.insert(0, str(host))
    from comfyui_paro.scripts.comfy_boot import import_torchvision

    import_torchvision()
    from comfy.cli_args import args

    args.cpu = device.type == "cpu"
    args.use_pytorch_cross_attention = True
    args.disable_xformers = True
    # Two models of one run stay where they are; weights were made on the GPU and have no other home.
    args.highvram = not args.cpu
    import comfyui_version

    return comfyui_version.__version__


@dataclass
class Loaded:
    """What one case needs: a patcher per stage, the sampling, and the shapes and conditioning in use."""

    run: WholeRun
    patchers: list[Any]
    case: TinyCase
    latent: Any
    conditioning: list[Any] = field(default_factory=list)


def load(run: WholeRun, device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Loaded:
    """Build the models of a sampling on `device`; tiny: at the size of the host tests."""
    from comfyui_paro.tests.host import tiny_families

    model = MODELS[run.model]
    case = model.tiny if tiny else model.case
    if not tiny_families.known(case):
        raise RuntimeError(f"this host does not know {case.config}")
    patchers = [_build(case, device, dtype, seed) for seed in range(len(run.stages))]
    latent = tiny_families.latent(case.runs[0].shape if tiny else run.latent)
    return Loaded(run, patchers, case, latent, [tiny_families.prompt(case, seed) for seed in (1, 2)])


def _build(case: TinyCase, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A patcher over a new model with random weights, made on the device they stay on."""
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, case.config)(dict(case.unet))
    config.set_inference_dtype(dtype, None)
    config.custom_operations = None
    model = config.get_model({}, "", device=device)
    network = model.diffusion_model
    if case.prepare is not None:
        case.prepare(network)
    network.to(device)  # tables that `prepare` made anew
    generator = torch.Generator(device).manual_seed(seed)
    for name, value in network.named_parameters():
        value.requires_grad_(False)
        if value.dim() == 1 and name.endswith(("weight", "scale")):
            value.fill_(1)
        else:
            value.normal_(0, 0.02, generator=generator)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def sample(loaded: Loaded, models: list[Any], on_step: Callable[[], None], warm_up: bool = False) -> torch.Tensor:
    """The host's sampler over every stage, one model each; the streams of a packed latent come back as a flat tensor.

    on_step is called after every step. warm_up: one step of every stage.
    """
    import comfy.sample

    run, out, first = loaded.run, loaded.latent, 0
    noise = comfy.sample.prepare_noise(loaded.latent, 0)
    sigmas = None if run.sigmas is None else torch.tensor(run.sigmas)
    stages = (1,) * len(run.stages) if warm_up else run.stages
    for model, count in zip(models, stages, strict=True):
        last = first + count
        whole = stages == (run.steps,)
        out = comfy.sample.sample(
            model,
            noise if first == 0 else noise * 0,
            run.steps,
            run.cfg,
            "euler",
            "simple",
            *loaded.conditioning,
            out,
            disable_noise=first > 0,
            start_step=None if whole else first,
            last_step=None if whole else last,
            force_full_denoise=last == run.steps,
            sigmas=sigmas,
            callback=lambda *_: on_step(),
            disable_pbar=True,
            seed=0,
        )
        first = last
    return torch.cat([t.flatten() for t in out.unbind()]) if getattr(out, "is_nested", False) else out
