"""What the demo leaves behind: the report and the pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from comfyui_paro.bench.metrics import cosine, psnr, ssim
from comfyui_paro.tests.tiny_wan.data import decode
from PIL import Image

SCALE = 2


def frames(video: torch.Tensor) -> list[Image.Image]:
    """Grey frames of `[T, height, width]` in [-1, 1], enlarged."""
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    size = (pixels.shape[2] * SCALE, pixels.shape[1] * SCALE)
    return [Image.fromarray(frame).resize(size, Image.NEAREST) for frame in pixels]


def animation(path: Path, video: torch.Tensor) -> None:
    """Save an animated picture."""
    first, *rest = frames(video)
    first.save(path, save_all=True, append_images=rest, duration=125, loop=0, lossless=True)


def difference(path: Path, dense: torch.Tensor, paro: torch.Tensor) -> None:
    """Three rows of frames: dense, PARO, and four times their absolute difference."""
    rows = [dense, paro, (dense - paro).abs() * 4 - 1]
    framed = [[np.pad(np.asarray(f), 2, constant_values=255) for f in frames(row)] for row in rows]
    Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in framed], 0)).save(path)


def write_results(out: Path, runs: dict, labels, host: str, version: str, args: argparse.Namespace) -> dict:
    """Write every file to `out` and return the report."""
    clips = {name: decode(run.latent)[0] for name, run in runs.items()}
    dense, paro = runs["dense"], runs["paro"]
    facts = paro.report
    report = {
        "host": host,
        "host_version": version,
        "torch": torch.__version__,
        "labels": list(labels),
        "seed": args.seed,
        "device": facts["device"],
        "backend": facts["backend"],
        "tokens": facts["tokens"],
        "grid": facts["grid"],
        "steps": facts["steps"],
        "dense_steps": facts["dense_steps"],
        "sites": facts["sites"],
        "sites_sparse": facts["sites_sparse"],
        "density": facts["density"],
        "densities": facts["densities"],
        "precision": facts["precision"],
        "mass_kept": facts["mass_kept"],
        "psnr_db": psnr(clips["paro"], clips["dense"]),
        "ssim": ssim(clips["paro"], clips["dense"]),
        "latent_cosine": cosine(paro.latent, dense.latent),
        "identity_order_psnr_db": psnr(clips["identity"], clips["dense"]),
        "orders_histogram": facts["orders_histogram"],
        "plan_source": facts["plan_source"],
        "calibration_seconds": facts["calibration_seconds"],
        "step_seconds": facts["step_seconds"],
        "dense_seconds": dense.seconds,
        "paro_seconds": paro.seconds,
        "fallbacks": facts["fallbacks"],
        "passed": facts["passed"],
        "notes": facts["notes"],
    }
    # Equal clips have no finite PSNR, and JSON has no infinity.
    report = {key: None if value == float("inf") else value for key, value in report.items()}
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    animation(out / "dense.webp", clips["dense"])
    animation(out / "paro.webp", clips["paro"])
    difference(out / "difference.png", clips["dense"], clips["paro"])
    (out / "plan.png").unlink(missing_ok=True)
    if paro.picture is not None:  # there is none when every call ran dense
        pixels = (paro.picture[0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(out / "plan.png")
    return report
