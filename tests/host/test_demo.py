"""The README's demo, by its command line, through a real ComfyUI."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host_on_cpu
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"


@pytest.mark.parametrize("options, density", [((), 0.7), (("--density", "0.4"), 0.4)])
def test_the_demo_runs_in_the_host(host_path, tmp_path, options, density):
    command = [sys.executable, SCRIPT, "--out", tmp_path, "--host", "comfyui", "--size", "4x8x8", *options]
    env = {**os.environ, "COMFYUI_PATH": str(host_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["density"] == pytest.approx(density, abs=0.05) and report["psnr_db"] > 15
    assert {"dense.webp", "paro.webp", "difference.png", "plan.png"} <= {path.name for path in tmp_path.iterdir()}
