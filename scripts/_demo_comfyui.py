"""The demo through a real ComfyUI: a workflow of the pack's own nodes, sent to the server's HTTP API."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from _demo_embedded import SHIFT, STEPS, Run
from comfy_server import ComfyServer
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.tests.tiny_wan.data import from_host_latent
from PIL import Image
from safetensors.torch import load_file

PACK = Path(__file__).resolve().parent.parent


class ComfyHost:
    """A server of its own with this pack loaded. `grid` is the token grid (F, H, W)."""

    name = "comfyui"

    def __init__(self, path: Path, grid: tuple[int, int, int], seed: int, folder: Path, progress) -> None:
        self.grid = grid
        self.seed = seed
        self.progress = progress
        self.server = ComfyServer(path, PACK, folder / "comfyui", cpu=not torch.cuda.is_available())
        progress("starting ComfyUI")
        self.server.__enter__()

    def close(self) -> None:
        """Stop the server."""
        self.server.__exit__()

    def run(self, labels: tuple[str, str, str], settings: Settings | None, title: str) -> Run:
        """Run the workflow for (shape, direction, background): dense with None, else with PARO on the model."""
        graph = self._graph(labels, settings)
        began = time.perf_counter()
        history = self.server.run(graph, waiting=lambda seconds: self.progress(f"{title}: {seconds:.0f} s"))
        seconds = _workflow_seconds(history) or time.perf_counter() - began
        (saved,) = history["outputs"]["save"]["latents"]
        file = self.server.folder / "output" / saved["subfolder"] / saved["filename"]
        latent = from_host_latent(load_file(file)["latent_tensor"].float())
        if settings is None:
            return Run(latent, seconds)
        picture = Image.open(io.BytesIO(self.server.images(history, "report")[0])).convert("RGB")
        pixels = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]
        return Run(latent, seconds, json.loads(self.server.text(history, "json")), pixels)

    def _graph(self, labels: tuple[str, str, str], settings: Settings | None) -> dict:
        f, h, w = self.grid
        shape, direction, background = labels
        graph = {
            "load": _node("PARODemoModel"),
            "shift": _node("ModelSamplingSD3", model=["load", 0], shift=SHIFT),
            "prompt": _node("PARODemoConditioning", shape=shape, direction=direction, background=background),
            # Two pixels of the latent per token, eight pixels of the picture per latent cell.
            "empty": _node(
                "EmptyHunyuanLatentVideo", width=16 * w, height=16 * h, length=4 * (f - 1) + 1, batch_size=1
            ),
            "sample": _node(
                "KSampler",
                model=["shift", 0],
                positive=["prompt", 0],
                negative=["prompt", 1],
                latent_image=["empty", 0],
                seed=self.seed,
                steps=STEPS,
                cfg=1.0,
                sampler_name="euler",
                scheduler="simple",
                denoise=1.0,
            ),
            "save": _node("SaveLatent", samples=["sample", 0], filename_prefix="demo"),
        }
        if settings is not None:
            graph["settings"] = _node(
                "PAROSettings",
                preset=settings.preset,
                density=0.3 if settings.density is None else settings.density,
                precision=settings.precision,
                dense_steps=-1 if settings.dense_steps is None else settings.dense_steps,
                order=settings.order,
                min_tokens=settings.min_tokens,
            )
            graph["paro"] = _node(
                "PAROPatchModel", model=["shift", 0], enabled=True, plan_file="auto", settings=["settings", 0]
            )
            graph["sample"]["inputs"]["model"] = ["paro", 0]
            graph["report"] = _node("PAROReport", model=["paro", 0], samples=["sample", 0])
            graph["json"] = _node("PreviewAny", source=["report", 1])
        return graph


def _node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def _workflow_seconds(history: dict) -> float | None:
    """Seconds between the start and the end of the whole workflow as the server logged them, or None."""
    stamps = [data["timestamp"] for kind, data in history["status"]["messages"] if "timestamp" in data]
    return (max(stamps) - min(stamps)) / 1000 if len(stamps) > 1 else None
