"""Compiling ahead: another process compiles what a run launches, under the names that the run looks for."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from comfyui_paro.paro_runtime.compiling import ahead
from comfyui_paro.paro_runtime.compiling.rehearsal import Job
from comfyui_paro.paro_runtime.compiling.worker import Compilers

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
MODULES = (
    "attention.triton_forward",
    "attention.triton_prepare",
    "tail_error.triton_block_costs",
    "tail_error.triton_row_errors",
    "pooling.triton_pools",
    "pooling.triton_quantized_pools",
)
JOB = Job((9, 0), "bfloat16", 128, 1, 1, 0, (21, 30, 52), 0, False, "fp8", "mass", 64)
# What a run of a session launches on a grid, against what a rehearsal of the grid's kind does; both only collect.
COMPARE = """
import importlib, json, sys, types
package = types.ModuleType("pack"); package.__path__ = [sys.argv[1]]; sys.modules["pack"] = package
import torch
of = lambda name: importlib.import_module("pack." + name)
rehearsal, session = of("paro_runtime.compiling.rehearsal"), of("paro_runtime.run.session")
Settings = of("paro_runtime.config.settings").Settings
Site, Identity = of("paro_runtime.plan.plan").Site, of("paro_runtime.plan.plan").ModelIdentity
recipe, layouts = of("paro_runtime.config.recipes").recipe_for("wan"), of("kernels.core.layout")
values = json.loads(sys.argv[2])
job, dense_steps, heads = rehearsal.Job.from_dict(values["job"]), values["dense_steps"], values["heads"]
launches = of("kernels.core.compile_only").pretend(job.capability)
with torch.inference_mode():
    rehearsal.rehearse(job.small(), launches)
    known = set(launches.compile)
    launches.compile.clear()
    layout = layouts.TokenLayout(job.prefix, job.grid, job.suffix)
    q, k, v = (torch.zeros(job.batch, layout.length, n, job.head_dim, dtype=torch.bfloat16).transpose(1, 2)
               for n in (heads * job.group, heads, heads))
    settings = Settings(preset="custom", density=0.3, backend="triton", precision=job.precision, strict=True,
                        dense_steps=dense_steps, dense_attention="paro")
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    run = session.Session(session.Policy(Identity("wan", "a", "w"), recipe, settings), sigmas=sigmas)
    # Nothing is computed: results are what memory held.
    of("paro_runtime.compiling.readiness").self_check = lambda *args, **sizes: None
    for sigma in sigmas[:-1]:
        evaluation = run.begin(layout=layout, sigma=sigma)
        evaluation.attend(Site("double", 0), q, k, v, dense=lambda: torch.zeros_like(q))
    report = run.finish()
print(json.dumps({"missing": sorted(set(launches.compile) - known), "sparse": report.calls.get("sparse"),
                  "launched": len(launches.compile)}))
"""


def without_interpreter() -> dict[str, str]:
    return {**os.environ, **ahead.WITHOUT_GPU}


def names_of_kernels(modules) -> str:
    """What Triton calls every function of these modules, imported in this order by a process of its own."""
    code = (
        "import importlib, sys, types\n"
        "package = types.ModuleType('pack'); package.__path__ = [sys.argv[1]]; sys.modules['pack'] = package\n"
        "found = {}\n"
        "for name in sys.argv[2].split(','):\n"
        "    for key, value in vars(importlib.import_module('pack.kernels.' + name)).items():\n"
        "        if hasattr(value, 'cache_key'): found[key] = value.cache_key\n"
        "print(sorted(found.items()))\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), ",".join(modules)]
    return subprocess.run(command, env=without_interpreter(), capture_output=True, text=True, check=True).stdout


def test_names_do_not_depend_on_what_a_process_launches_first():
    assert len(names_of_kernels(MODULES)) > 1000
    assert names_of_kernels(MODULES) == names_of_kernels(MODULES[::-1])


@pytest.mark.parametrize(
    "changes, dense_steps, heads",
    [
        ({}, 1, 3),
        ({}, 0, 4),
        ({"batch": 2}, 2, 3),
        ({"grid": (1, 128, 128), "prefix": 512, "batch": 1}, 1, 3),
        ({"grid": (9, 41, 47), "group": 2}, 1, 4),
        ({"grid": (3, 45, 47)}, 1, 5),
        ({"grid": (6, 24, 32), "head_dim": 64, "suffix": 40, "precision": "int8"}, 2, 3),
    ],
)
def test_a_rehearsal_launches_all_that_a_run_does(changes, dense_steps, heads):
    job = Job(**{**asdict(JOB), **changes})
    task = json.dumps({"job": asdict(job), "dense_steps": dense_steps, "heads": heads})
    command = [sys.executable, "-c", COMPARE, str(ROOT), task]
    done = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["missing"] == []
    assert found["sparse"] == 5 - dense_steps and found["launched"] > 10


@pytest.mark.parametrize("at_once", [0, 1, 3])
def test_all_is_compiled_the_longest_first(tmp_path, at_once):
    """Each leaves a file with the number of those that had begun and were not over."""
    begun, over = tmp_path / "begun", tmp_path / "over"
    begun.mkdir(), over.mkdir()
    compilers = Compilers(at_once)

    def work(name: str, good: bool = True):
        def compile_it() -> bool:
            (begun / name).write_text(str(len(list(begun.iterdir())) - len(list(over.iterdir()))))
            time.sleep(0.05)
            (over / name).touch()
            return good

        return compile_it

    names = [("small", "a"), ("small", "b"), ("attention_forward", "c"), ("gluon_forward", "d"), ("small", "e")]
    for kind, name in names:
        compilers.add(kind, work(name), "late" if name == "d" else "first")
    told = []
    assert compilers.finish(lambda part: told.append((part, len(list(over.iterdir())))), ("first", "late", "none"))
    assert sorted(path.name for path in over.iterdir()) == list("abcde")
    assert {part for part, _ in told} == {"first", "late", "none"} and dict(told)["first"] >= 4
    assert max(int(path.read_text()) for path in begun.iterdir()) < max(1, at_once)
    if at_once == 1:  # the first was begun when it came
        began = sorted(begun.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert [path.name for path in began] == list("adcbe")
    if at_once == 0:  # nobody waits longer than necessary for what a run needs
        assert told[0] == ("none", 0) and told[1] == ("first", 4)


@pytest.mark.parametrize("at_once", [0, 2])
def test_one_that_fails_is_told_and_stops_no_other(tmp_path, at_once):
    compilers = Compilers(at_once)
    compilers.add("bad", lambda: False, "first")
    compilers.add("good", lambda: bool((tmp_path / "there").write_text("x")), "first")
    assert not compilers.finish(lambda part: None, ("first",))
    assert (tmp_path / "there").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv(ahead.SWITCH, raising=False)
    monkeypatch.setattr(ahead, "_known", {})
    monkeypatch.setattr(ahead, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def worker(tmp_path, monkeypatch, code: str) -> None:
    """Let a stand-in do the compiling; nothing is loaded early."""
    monkeypatch.setattr(ahead, "_load_beside", lambda job: None)
    path = tmp_path / "worker.py"
    path.write_text("import json, pathlib, sys, time\ntask = json.loads(sys.argv[1])\n" + code)
    monkeypatch.setattr(ahead, "WORKER", path)


def test_each_part_is_ready_when_its_marker_is_there(tmp_path, monkeypatch, folder):
    go = tmp_path / "go"
    code = (
        "first, second = map(pathlib.Path, task['markers'])\n"
        "first.touch()\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\n"
        "second.touch()\n"
    )
    worker(tmp_path, monkeypatch, code)
    found = ahead.ahead_of(JOB)
    assert found.wait(60) and not found.late_ready() and not found.wait(0.0, late=True)
    assert ahead.ahead_of(Job(**{**asdict(JOB), "grid": (21, 45, 80)})) is found  # the same kernels
    assert not ahead.wait_for_all(0.0)
    go.touch()
    assert found.wait(60, late=True) and ahead.wait_for_all(0.0)
    ahead._known.clear()
    monkeypatch.setattr(ahead, "WORKER", tmp_path / "not there")
    again = ahead.ahead_of(JOB)
    assert again.ready() and again.late_ready()


def test_a_worker_that_fails_holds_nobody_up_and_is_told(tmp_path, monkeypatch, folder, caplog):
    worker(tmp_path, monkeypatch, "sys.exit('no compiler here')\n")
    found = ahead.ahead_of(JOB)
    assert found.wait(60) and found.late_ready()
    assert "no compiler here" in caplog.text


def test_what_most_runs_need_is_compiled_at_the_start(tmp_path, monkeypatch, folder):
    worker(tmp_path, monkeypatch, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ahead.at_start().join()
    assert not ahead._known
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    ahead.at_start().join()
    assert [kind for kind, _ in ahead._known] == [JOB.small()]
    ahead._known.clear()
    monkeypatch.setenv(ahead.SWITCH, "0")
    ahead.at_start().join()
    assert not ahead._known


def test_trouble_at_the_start_is_a_line_in_the_log(monkeypatch, caplog):
    def fail():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(ahead, "usual_job", fail)
    ahead.at_start().join()
    assert "driver too old" in caplog.text


def test_what_first_calls_need_is_loaded_early(tmp_path, monkeypatch, folder, caplog):
    load = ahead._load_beside
    worker(tmp_path, monkeypatch, "")
    asked = []
    monkeypatch.setattr(ahead, "_load_beside", load)
    monkeypatch.setattr(ahead, "problem", lambda *what: asked.append(what))
    for _ in range(2):
        ahead.ahead_of(JOB)
        _join("paro-load-early")
    assert asked == [(torch.bfloat16, 128, 128, 64)]
    # Trouble there is nobody's business: whoever needs it meets it again.
    ahead._known.clear()
    monkeypatch.setattr(ahead, "load_early", lambda job: 1 / 0)
    with caplog.at_level("DEBUG", logger="paro"):
        ahead.ahead_of(JOB)
        _join("paro-load-early")
    assert "ZeroDivisionError" in caplog.text


def _join(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join()


def test_another_kind_of_run_is_compiled_by_itself(tmp_path, monkeypatch, folder):
    worker(tmp_path, monkeypatch, "")
    assert ahead.ahead_of(JOB) is not ahead.ahead_of(Job(**{**asdict(JOB), "head_dim": 64}))
