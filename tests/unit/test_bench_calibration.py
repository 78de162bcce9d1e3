"""The calibration benchmark: a row of a tiny shape, what it says without a GPU, and its table."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from bench import calibration, problems, report


def test_a_row_of_a_tiny_shape_has_every_part():
    row = calibration.measure(problems.SHAPES["tiny"], 2, torch.device("cpu"), repeats=1)
    assert row["peak_mib"] is row["refresh_peak_mib"] is None and row["orders"] > 2
    times = ("dense", "orders", "costs", "tail", "every_row", "observe", "plan", "refresh")
    assert all(row[f"{name}_ms"] > 0 for name in times)
    assert row["ratio"] == row["observe_ms"] / row["dense_ms"]
    head = {"gpu": "G", "torch": "1", "triton": "2", "date": "3", "commit": "4"}
    page = "\n".join(report.calibration_tables([{**head, "rows": [{"shape": "tiny", **row, "ratio": 1.25}]}]))
    assert "| tiny | 211 | 2 |" in page and "| 1.25 |" in page and "not measured" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys, tmp_path):
    assert calibration.main(["--json", str(tmp_path / "x.json")]) == 0
    assert capsys.readouterr().out == "not measured: no GPU\n" and not list(tmp_path.iterdir())


def test_an_unknown_shape_is_an_error(capsys):
    with pytest.raises(SystemExit):
        calibration.main(["--shapes", "tiny,nonsense"])
    assert "nonsense is none of" in capsys.readouterr().err


def test_a_page_without_results_says_so():
    assert "not measured" in "\n".join(report.calibration_tables([]))
