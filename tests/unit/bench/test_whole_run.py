"""The whole-run benchmark without a host: its parts, its file, its tables, its place in the README."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from comfyui_paro.bench.paro_bench import timeline
from comfyui_paro.bench.paro_bench.real_models import RUNS
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.attention.dense import dense_pattern
from comfyui_paro.paro_runtime.attention.patterns import build_pattern

from bench import report, whole_run

HEADER = {"gpu": "G", "torch": "1", "triton": "2", "comfyui": "3", "commit": "c", "date": "d"}
DENSE = {"case": "a", "attention": "dense", "run": None, "seconds": 10.0, "speedup": 1.0}
PARO = {
    "case": "a",
    "attention": "paro",
    "run": "second",
    "seconds": 4.0,
    "speedup": 2.5,
    "sites_sparse": 3,
    "sites": 4,
}
PARO |= {"fallbacks": {"why": 2}, "parts": {"planning": 1.25}, "notes": ["two weight sets"]}
BROKEN = {"case": "a", "attention": "int8", "run": None, "error": "no such kernel"}


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves on by one whenever it is looked at."""
    ticks = iter(range(1000))
    monkeypatch.setattr(timeline.Timeline, "_stamp", lambda self: next(ticks))
    return timeline.Timeline(torch.device("cpu"))


def test_nested_parts_are_counted_once_and_add_up(clock):
    clock.begin()  # 0
    with clock.part("observing"):  # 1
        clock.timed("compiling", lambda: None)()  # 2 to 3
    clock.step()  # 4 is the end of observing, 5 the step
    clock.end()  # 6
    parts = clock.parts()
    assert {name: value for name, value in parts.items() if value} == {
        timeline.REST: 1 + 2,
        "observing": 2,
        "compiling": 1,
    }
    assert sum(parts.values()) == 6 and clock.step_seconds() == [5]


def test_what_other_threads_do_is_not_seen(clock):
    clock.begin()
    thread = threading.Thread(target=clock.timed("compiling", lambda: None))
    thread.start()
    thread.join()
    clock.end()
    assert clock.parts()["compiling"] == 0
    assert clock.timed("compiling", lambda: "after the run")() == "after the run"


def test_every_function_that_is_timed_is_there_and_is_put_back(clock):
    from comfyui_paro.paro_runtime.calibration import calibrator
    from comfyui_paro.paro_runtime.run import evaluation

    before = calibrator.Calibrator.observe, evaluation.run_kernel
    with timeline.hooked(clock):
        assert calibrator.Calibrator.observe is not before[0] and evaluation.run_kernel is not before[1]
    assert (calibrator.Calibrator.observe, evaluation.run_kernel) == before


def test_a_function_that_is_gone_is_named(clock, monkeypatch):
    gone = {"observing": (f"{timeline.PACK}.calibration:Calibrator.looks", "?no_such_module:f"), "planning": ("x.y:z",)}
    monkeypatch.setattr(timeline, "HOOKS", gone)
    with pytest.raises(timeline.HookMissingError, match=r"Calibrator\.looks, x\.y:z"), timeline.hooked(clock):
        pass


def test_dense_steps_of_the_kernel_are_dense_attention():
    layout, device = TokenLayout(0, (4, 8, 8), 0), torch.device("cpu")
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    kept = build_pattern(layout, ("FHW", "FHW"), mask, None)
    assert timeline._kernel_part(None, None, None, dense_pattern(layout, 2, 2, device)) == "dense_attention"
    assert timeline._kernel_part(None, None, None, kept, "int8", scale=None) == "sparse_attention"


def test_a_row_that_is_run_again_replaces_the_one_before(tmp_path):
    path = tmp_path / "rows.json"
    whole_run.Results(path, HEADER).put(DENSE)
    again = whole_run.Results(path, {**HEADER, "commit": "later"})
    again.put(PARO)
    again.put({**DENSE, "seconds": 9.0})
    rows = json.loads(path.read_text())["rows"]
    assert [(row["attention"], row["seconds"], row["commit"]) for row in rows] == [
        ("dense", 9.0, "later"),
        ("paro", 4.0, "later"),
    ]
    with pytest.raises(SystemExit, match="rows of G, this is H"):
        whole_run.Results(path, {**HEADER, "gpu": "H"})


def test_files_are_named_after_the_gpu():
    assert whole_run._slug("NVIDIA H100 80GB HBM3") == "h100"
    assert whole_run._slug("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


def test_settings_have_the_type_of_their_value():
    args = whole_run.arguments(["--host", "x", "--setting", "density=0.2", "--setting", "dense_attention=paro"])
    assert args.setting == [("density", 0.2), ("dense_attention", "paro")]
    with pytest.raises(SystemExit):
        whole_run.arguments(["--host", "x", "--setting", "densty=0.2"])


def test_the_page_has_a_line_per_row_and_says_what_is_not_measured():
    rows = [DENSE, BROKEN, {**PARO, "commit": "other"}]
    page = "\n".join(report.whole_run_tables([{**HEADER, "rows": rows}]))
    paro = next(line for line in page.splitlines() if line.startswith("| a | paro |"))
    assert paro.startswith("| a | paro | second | 4.0 | 2.50 | 3 of 4 | 2 | not measured | not measured |")
    head = next(line for line in page.splitlines() if line.startswith("| case |"))
    assert "| 1.2 |" in paro and paro.count("|") == head.count("|")
    assert "not measured (no such kernel)" in page and "a: two weight sets." in page and "commits other" in page
    assert "Nothing: not measured." in "\n".join(report.whole_run_tables([]))


def test_the_readme_says_what_the_rows_say():
    rows = [DENSE, BROKEN, PARO]
    line = "| a | G | 10.0 s | not measured | not measured | not measured | 2.50 |"
    block = report.speed_block([{**HEADER, "rows": [*rows[:2], {**PARO, "commit": "b"}]}])
    assert line in block and "up to d, at b, c." in block
    claimed = [{**row, "case": report.CLAIMED} for row in rows]
    claim = report.claim_block([{**HEADER, "rows": rows}, {**HEADER, "gpu": "H", "rows": claimed}])
    assert (
        "on one H: 4.0 seconds" in claim
        and "takes 10.0 (2.5 times as fast)" in claim
        and "d at commit c in ComfyUI 3" in claim
    )
    for empty in (report.claim_block([]), report.claim_block([{**HEADER, "rows": rows}]), report.speed_block([])):
        assert empty == "Whole runs: not measured.\n"


def test_blocks_replace_what_stood_between_their_marks():
    first, last = report.SPEED_MARKS
    readme = report.with_block(f"x\n{first}\nold 9.9 times\n{last}\ny", report.SPEED_MARKS, "new\n")
    assert readme == f"x\n{first}\nnew\n{last}\ny"
    with pytest.raises(ValueError, match="once each"):
        report.with_block("no marks", report.SPEED_MARKS, "new\n")


def test_every_title_is_of_a_run():
    assert set(report.TITLES) <= set(RUNS) and report.CLAIMED in report.TITLES


def test_the_committed_pages_stand_in_the_committed_results():
    reports = report.read("whole_run*.json")
    readme = report.README.read_text(encoding="utf-8")
    assert readme == report.with_speed(readme, reports), "run bench/report.py"
    assert report.TARGET.read_text(encoding="utf-8") == report.benchmarks_page(), "run bench/report.py"
