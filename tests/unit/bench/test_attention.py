"""The attention benchmark: its masks, its exact rows, a run on a tiny shape, and the page made of results."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.support import interpreted
from comfyui_paro.tests.unit.kernels.cases import CASES, make, oracle, relative_error

pytest.importorskip("triton")
from bench import problems, report


@pytest.mark.parametrize("kind", ["structured", "random"])
def test_masks_have_the_density_asked(kind: str):
    mask = problems.block_mask(kind, 0.3, 4, Geometry(0, (4, 20, 32), 0), "cpu")
    assert mask.shape == (4, 40, 40) and (mask.sum(2) == 12).all()


@pytest.mark.parametrize("case", CASES[:1] + CASES[9:17], ids=lambda case: case.name)
def test_exact_rows_are_exact(case):
    q, k, v, pattern, _ = make(case)
    rows = torch.arange(q.shape[2])
    got = torch.stack([problems.exact_rows(q, k, v, pattern, h, rows) for h in range(q.shape[1])])
    assert relative_error(got, oracle(q, k, v, pattern)[0]) < 1e-5


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
def test_runs_on_a_tiny_shape(tmp_path, capsys):
    from bench import attention

    target = tmp_path / "attention.json"
    options = ["--shapes", "tiny", "--densities", "1,0.2", "--precisions", "int8", "--device", "cpu"]
    assert attention.main([*options, "--rivals", "sdpa_flash,kitchen_sol_attn", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["rows"]
    ours = [row for row in rows if row["name"] == "paro int8"]
    assert len(ours) == 2 and all(row["error"] < 2e-2 and row["total_ms"] > 0 for row in ours)
    assert any("reason" in row for row in rows if row["name"] == "kitchen_sol_attn")
    page = report.render([json.loads(target.read_text())])
    assert "paro int8 + tail" in page and "not measured" in page


def test_page_without_results_says_so():
    assert "not measured" in report.render([])
