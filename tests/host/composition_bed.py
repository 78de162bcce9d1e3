"""What compositions are made on: a tiny model of the real host, and ways to sample it. Imports comfy: after boot."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import torch

from . import tiny, tiny_families
from .cases_image import CASES as IMAGE_CASES
from .cases_video import CASES as VIDEO_CASES

CASES = {case.name: case for case in (*VIDEO_CASES, *IMAGE_CASES)}
GRID, IMAGE_GRID = (5, 7, 9), (1, 15, 13)
STEPS = 3


class Bed:
    """One model and how it is sampled.

    kind   `wan` and `flux` come from the host's loader, others are built from their case.
    files  the checkpoints by kind.
    batch  how many at once, where nothing else is said.
    """

    def __init__(self, kind: str, files: dict[str, Path], batch: int = 1) -> None:
        self.kind, self.files = kind, files
        self.case = None if kind in files else CASES[kind]
        self.model = tiny.load(files[kind]) if kind in files else tiny_families.build(self.case)
        self.seen: list = []
        self.batch = batch

    @property
    def sites(self) -> int:
        """Self-attention calls of an evaluation."""
        return {"wan": tiny.LAYERS, "flux": 1 + tiny.LAYERS}.get(self.kind) or self.case.sites

    @staticmethod
    def extra(module: str) -> Any:
        """A module of the host's own nodes."""
        return import_module(f"comfy_extras.{module}")

    def another(self) -> Any:
        """The same weights, loaded once more."""
        return tiny.load(self.files[self.kind])

    def text(self, seed: int, **extra: Any) -> list:
        """A prompt."""
        return tiny.text(seed, **extra) if self.case is None else tiny_families.prompt(self.case, seed, **extra)

    def latent(self, grid: tuple[int, int, int] | None = None, batch: int = 1) -> torch.Tensor:
        """An empty latent, of the usual size or another."""
        if self.case is not None:
            return tiny_families.latent(self.case.runs[0].shape, batch)
        video = self.kind == "wan"
        return tiny.latent(grid or (GRID if video else IMAGE_GRID), batch, video)

    @torch.inference_mode()
    def sample(
        self, model: Any, positive: list | None = None, negative: list | None = None, *, steps: int = STEPS,
        cfg: float = 3.0, sampler: str = "euler", latent: torch.Tensor | None = None, noise: bool = True, **more: Any,
    ) -> torch.Tensor:  # fmt: skip
        """The host's sampler. noise: whether it is added to the latent; more: for `comfy.sample.sample`."""
        empty = self.latent(batch=self.batch) if latent is None else latent
        drawn = comfy.sample.prepare_noise(empty, 0) if noise else torch.zeros_like(empty)
        texts = self.text(1) if positive is None else positive, self.text(2) if negative is None else negative
        more = {"disable_pbar": True, "seed": 0, **more}
        return comfy.sample.sample(model, drawn, steps, cfg, sampler, "simple", *texts, empty, **more)

    def sigmas(self, model: Any, steps: int = STEPS) -> torch.Tensor:
        """Of the host's even schedule."""
        return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)

    @torch.inference_mode()
    def guided(self, guider: Any, sigmas: torch.Tensor, sampler: Any = None, latent: Any = None) -> torch.Tensor:
        """The host's `SamplerCustomAdvanced`."""
        nodes = self.extra("nodes_custom_sampler")
        start = {"samples": self.latent() if latent is None else latent}
        noise = nodes.RandomNoise.execute(0)[0] if latent is None else nodes.DisableNoise.execute()[0]
        sampler = sampler or comfy.samplers.sampler_object("euler")
        return nodes.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, start)[0]["samples"]

    def guider(self, model: Any, cfg: float = 3.0) -> Any:
        """The host's usual guider over two prompts."""
        nodes = self.extra("nodes_custom_sampler")
        return nodes.CFGGuider.execute(model, self.text(1), self.text(2), cfg)[0]

    def lora(self) -> dict[str, torch.Tensor]:
        """A LoRA for every query projection of Wan's self-attention, of rank 2."""
        drawn, weights = torch.Generator().manual_seed(5), {}
        for index in range(tiny.LAYERS):
            name = f"diffusion_model.blocks.{index}.self_attn.q"
            width = self.model.model.diffusion_model.blocks[index].self_attn.q.weight.shape[0]
            weights[f"{name}.lora_up.weight"] = torch.randn(width, 2, generator=drawn) * 0.1
            weights[f"{name}.lora_down.weight"] = torch.randn(2, width, generator=drawn) * 0.1
        return weights
