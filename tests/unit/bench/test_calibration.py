"""The calibration benchmark: a row of a tiny shape, what it says without a GPU, and its table."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")
from bench import calibration, problems, report


def test_a_row_of_a_tiny_shape_has_every_part():
    row = calibration.measure(problems.SHAPES["tiny"], 2, torch.device("cpu"), repeats=1)
    assert row["peak_mib"] is row["refresh_peak_mib"] is None and row["orders"] > 2
    times = ("dense", "orders", "costs", "tail", "every_row", "observe", "plan", "refresh", "look")
    assert all(row[f"{name}_ms"] > 0 for name in times)
    assert row["ratio"] == row["observe_ms"] / row["dense_ms"]
    head = {"gpu": "G", "torch": "1", "triton": "2", "date": "3", "commit": "4"}
    page = "\n".join(report.calibration_tables([{**head, "rows": [{"shape": "tiny", **row, "ratio": 1.25}]}]))
    assert "| tiny | 211 | 2 |" in page and "| 1.25 |" in page and "not measured" in page


def test_a_step_of_the_tiny_model_is_measured_part_by_part(monkeypatch, capsys, tmp_path):
    threads = torch.get_num_threads()
    monkeypatch.setattr(calibration, "GRIDS", ((4, 8, 10),))
    path = tmp_path / "tiny.json"
    assert calibration.main(["--tiny", "--repeats", "1", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    (row,) = found["rows"]
    assert json.loads(capsys.readouterr().out)["grid"] == row["grid"] == "4x8x10"
    times = [row[f"{name}_ms"] for name in ("attention", "orders", "tail", "rotation")]
    assert min(times) > 0 and row["ratio"] == pytest.approx(row["all_ms"] / row["attention_ms"])
    assert found["cpu"] and found["threads"] == 1 and found["repeats"] == 1
    page = "\n".join(report.tiny_calibration_tables([{**found, "rows": [{**row, "ratio": 2.125}]}]))
    assert found["cpu"] in page and "| 4x8x10 | 320 |" in page and "| 2.12 |" in page
    assert "not measured" in "\n".join(report.tiny_calibration_tables([]))


def test_recorded_calls_are_those_of_the_step():
    """Four layers, two heads; another step shows others."""
    bench = calibration.TinyBench((4, 8, 10), seeds=())
    calls, others = (calibration.recorded(bench, 1000, step) for step in (2, 0))
    assert len(calls) == 4 and all(x.shape == (1, 2, 320, 128) for call in calls for x in call)
    assert not torch.equal(calls[0][0], others[0][0])


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
