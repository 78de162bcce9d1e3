"""The demo without ComfyUI: the runtime's session driven by a small sampler over the bundled model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session
from comfyui_paro.tests.tiny_wan.data import context_for
from comfyui_paro.tests.tiny_wan.model import load_tiny_wan
from comfyui_paro.tests.tiny_wan.sampler import sample, sigmas

STEPS = 8
SHIFT = 3.0


@dataclass(frozen=True)
class Run:
    """One clip: its latent `[1, 16, F, 2H, 2W]` and seconds; with PARO also the report and the plan's picture."""

    latent: torch.Tensor
    seconds: float
    report: dict | None = None
    picture: torch.Tensor | None = None


class EmbeddedHost:
    """The bundled model and sampler. `grid` is the token grid (F, H, W); `progress(text)` is called as work goes on."""

    name = "embedded"

    def __init__(self, _path: None, grid: tuple[int, int, int], seed: int, folder: Path, progress) -> None:
        self.model = load_tiny_wan()
        self.grid = grid
        self.seed = seed
        self.progress = progress
        self.version = torch.__version__

    def close(self) -> None:
        """Nothing to stop."""

    def run(self, labels: tuple[str, str, str], settings: Settings | None, title: str) -> Run:
        """Sample one clip of (shape, direction, background): dense with None, else through a PARO session."""
        levels = sigmas(STEPS, SHIFT).tolist()
        session = None
        if settings is not None:
            identity = ModelIdentity("wan", "tinywan0", "embedded")
            policy = Policy(identity, recipe_for("wan"), settings)
            session = Session(policy, sigmas=levels)
        evaluation = None
        layout = TokenLayout(0, self.grid)

        def on_step(step: int, sigma: float) -> None:
            nonlocal evaluation
            self.progress(f"{title}: step {step + 1}/{STEPS}")
            if session is not None:
                evaluation = session.begin(layout=layout, sigma=sigma)

        def attention(q, k, v, *, layer):
            def dense():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

            return evaluation.attend(Site("double", layer), q, k, v, dense=dense)

        f, h, w = self.grid
        began = time.perf_counter()
        latent = sample(
            self.model,
            context_for(*labels),
            (f, 2 * h, 2 * w),
            steps=STEPS,
            shift=SHIFT,
            seed=self.seed,
            attention=None if session is None else attention,
            on_step=on_step,
        )
        seconds = time.perf_counter() - began
        if session is None:
            return Run(latent, seconds)
        report = session.finish()
        return Run(latent, seconds, report.as_dict(), report.picture())
