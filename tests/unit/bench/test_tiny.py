"""The bench's short cuts give what plain runs give, and its summary says what the records say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_paro.bench.metrics import psnr
from comfyui_paro.bench.paro_bench.tiny import TinyBench, Variant
from comfyui_paro.bench.paro_bench.tiny_rows import acceptance, overview
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator
from comfyui_paro.tests.tiny_wan import data

SCRIPT = Path(__file__).resolve().parents[3] / "bench" / "fidelity.py"


@pytest.mark.parametrize("dense", [1, 3])
def test_videos_side_by_side_are_what_each_is_alone(dense, monkeypatch):
    """Plans in passing, budgets, measured biases and masks, against a session for each video."""
    made, real = [], Calibrator.plan
    monkeypatch.setattr(Calibrator, "plan", lambda self, by, **more: made.append(real(self, by, **more)) or made[-1])
    bench = TinyBench((4, 8, 10), seeds=(7, 8))
    variant = Variant("ours, passing", 0.4, dense, plan="passing")
    plans = bench.passing_plans(variant)
    together = bench.run(variant)
    for number, seed in enumerate(bench.seeds):
        session = bench.session(variant)
        alone = bench.sample([seed], session)
        # As it was made: a plan of pure noise gets its masks in the run.
        plan, routed = made[-1], session.finish().sites_routed
        assert routed == (len(plan.sites) if dense == 1 else 0)
        for site, entry in plan.sites.items():
            assert entry.orders == plans[number].sites[site].orders
            if dense > 1:
                same = (entry.mask() == plans[number].sites[site].mask()).float().mean()
                assert same > 0.98  # batches sum in another order
        assert plan.densities == pytest.approx(plans[number].densities, abs=0.01)
        likeness = psnr(data.decode(alone)[0], bench.dense_video[number])
        assert likeness == pytest.approx(together["psnr_each"][number], abs=0.5)
    assert together["kept_density"] == pytest.approx(0.4, abs=0.02) and len(together["densities"]) == 3


def records(*rows):
    names = ("name", "grid", "dense_steps", "density", "psnr")
    rest = {"psnr_worst": 1.0, "ssim": 0.5, "latent_cosine": 0.5}
    return [dict(zip(names, row, strict=True)) | rest for row in rows]


ROWS = records(
    ("ours, offline", "8x12x12", 3, 0.1, 27.0),
    ("ours, offline, drop", "8x12x12", 3, 0.1, 25.5),
    ("ours, offline, drop", "8x12x12", 3, 0.2, 28.25),
    ("radial", "8x12x12", 3, 0.1, 22.0),
    ("radial", "9x13x11", 3, 0.1, 21.0),
    ("ours, passing", "8x12x12", 3, 0.1, 28.0),
)


def test_the_overview_has_a_column_per_grid_and_density_and_blanks_for_what_was_not_run():
    assert overview(ROWS).splitlines() == [
        "| | 8x12x12, 0.1 | 8x12x12, 0.2 | 9x13x11, 0.1 |",
        "|---|---|---|---|",
        "| *3 of 8 steps dense* | | | |",
        "| ours, offline | 27.0 (1.0) |  |  |",
        "| ours, offline, drop | 25.5 (1.0) | 28.2 (1.0) |  |",
        "| radial | 22.0 (1.0) |  | 21.0 (1.0) |",
        "| ours, passing | 28.0 (1.0) |  |  |",
    ]


def test_the_summary_compares_what_there_is():
    lines = acceptance(ROWS).splitlines()[1:]
    assert lines == [
        "- line 0, tail against drop, 8x12x12, 3 of 8 dense: 0.1: +1.50, 0.1 with tail against 0.2 dropping: -1.25",
        "- line 2, ours against radial, 8x12x12, 3 of 8 dense: 0.1: +5.00",
        "- line 5, passing against offline, 8x12x12, 3 of 8 dense: 0.1: +1.00",
    ]


def test_merging_joins_records_and_says_where_they_were_made(tmp_path):
    newer = records(("radial", "8x12x12", 3, 0.1, 23.0))
    for name, rows in (("a", ROWS), ("b", newer)):
        made_on = {"device": "GPU", "torch": "2", "python": "3", "date": "2026-01-02", "command": name}
        (tmp_path / f"{name}.json").write_text(json.dumps({**made_on, "records": rows}))
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    command = [sys.executable, str(SCRIPT), "--suite", "tiny", "--merge", *files, "--json", str(tmp_path / "c.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ours against radial, 8x12x12, 3 of 8 dense: 0.1: +4.00" in done.stdout
    joined = json.loads((tmp_path / "c.json").read_text())
    assert len(joined["records"]) == len(ROWS) and joined["device"] == "GPU" and joined["merged"] == ["a", "b"]
