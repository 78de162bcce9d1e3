"""Suite `seeds`: the presets as a user has them, run after run of the tiny model, each against its own dense run."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from ...paro_runtime.config.settings import Settings
from ...tests.tiny_wan.sheet import save_sheet
from .tiny import GRIDS, TinyBench, Variant

PRESETS = ("quality", "balanced", "fast")
FRAMES = (2, 5)
"""Frames of each clip on the contact sheet."""


class Preset(Variant):
    """A preset of the product, on grids of any size."""

    def settings(self) -> Settings:
        """See `Variant.settings`."""
        return Settings(preset=self.name, precision=self.precision, backend=self.backend, min_tokens=0, strict=True)


def one_seed(seed: int, preset: str, precision: str) -> tuple[dict, tuple[torch.Tensor, torch.Tensor]]:
    """The record of a clip sampled alone, and frames of its dense and sparse run, each float `[F, H, W]`."""
    torch.set_num_threads(1)
    bench = TinyBench(GRIDS[0], "cpu", (seed,))
    variant = Preset(preset, 0.0, 0, precision=precision)
    session = bench.session(variant, plan=None)
    latents = bench.sample((seed,), session)
    report = session.finish()
    video = bench.decode(latents)
    record = {"name": f"seed {seed}", "preset": preset, "precision": precision, "grid": "x".join(map(str, bench.grid))}
    record |= {"dense_steps": session.schedule.dense_steps, "density": report.density}
    record |= {"psnr": bench.compare(latents)["psnr"], "attention_error": list(report.attention_error or ())}
    return record, (bench.dense_video[0, list(FRAMES)], video[0, list(FRAMES)])


def run(seeds: range, presets: list[str], precision: str, workers: int, sheet: Path | None) -> list[dict]:
    """Records of every preset and seed; `sheet` becomes a PNG with a row for each seed of `balanced`: dense, sparse and
    four times their difference."""
    records, rows = [], []
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for preset in presets:
            made = list(pool.map(one_seed, seeds, [preset] * len(seeds), [precision] * len(seeds)))
            records += [record for record, _ in made]
            rows += [torch.cat([a, b, 4 * (a - b).abs() - 1]) for _, (a, b) in made if preset == "balanced"]
    if sheet:
        save_sheet(sheet, torch.stack(rows))
    return records


def table(records: list[dict]) -> str:
    """Markdown: a line per preset."""
    lines = ["| preset | kept blocks | seeds | PSNR mean | worst |", "|---|---|---|---|---|"]
    for preset in dict.fromkeys(r["preset"] for r in records):
        of = [r for r in records if r["preset"] == preset]
        values, density = [r["psnr"] for r in of], sum(r["density"] for r in of) / len(of)
        figures = f"{density:.2f} | {len(of)} | {sum(values) / len(of):.1f} | {min(values):.1f}"
        lines.append(f"| {preset} | {figures} |")
    return "\n".join(lines)
