"""Check PARO on this GPU in a real ComfyUI: `python scripts/gpu_check.py --host CHECKOUT [--json FILE]`.

Runs the tests of the kernels on the GPU, then those of the host with the host on the GPU, with this Python and nothing
set up; side by side where pytest-xdist is there, since most of the time goes into compiling. The JSON is written
whatever happens. Exits 1 unless everything that could run passed; the last line counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _host import host_version, is_host

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("tests/gpu", "tests/host")
# Of the tests' names: one per family and dtype.
FAMILY_TEST = "test_gpu_families.py::test_family["
# pytest's exit codes of a session that went its way: all passed, some failed, nothing was chosen.
WENT_WELL, NOTHING_CHOSEN = (0, 1), 5
MOST_JOBS = 8  # each boots the host, and shares the GPU with the others


@dataclass(frozen=True)
class Result:
    """One test that ran. outcome: passed, failed or skipped; why: the first line of its error, or what it lacked."""

    name: str
    outcome: str
    why: str = ""


def read_junit(path: Path, folder: str) -> list[Result]:
    """The tests of one session of pytest over `folder` from its junit file; one that failed and then could not be torn
    down, or the other way round, counts once, as failed."""
    found: dict[str, Result] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        module, _, rest = case.get("classname", "").removeprefix(folder.replace("/", ".")).lstrip(".").partition(".")
        inside = "".join(f"{part}::" for part in rest.split(".") if part)
        where = f"{folder}/{module}.py::" if module else ""  # without: a file that could not be read
        name = f"{where}{inside}{case.get('name')}"
        outcome, why = "passed", ""
        for tag in ("skipped", "error", "failure"):
            element = case.find(tag)
            if element is not None:
                outcome = "skipped" if tag == "skipped" else "failed"
                why = ((element.get("message") or element.text or "").strip().splitlines() or [""])[0][:300]
        if name not in found or (outcome == "failed" != found[name].outcome):
            found[name] = Result(name, outcome, why)
    return list(found.values())


def families(tests: list[Result]) -> dict[str, dict[str, str]]:
    """Outcome of every family that was tested, by dtype."""
    found: dict[str, dict[str, str]] = {}
    for test in tests:
        _, here, case = test.name.partition(FAMILY_TEST)
        if here:
            family, _, dtype = case.rstrip("]").rpartition("-")
            found.setdefault(family, {})[dtype] = test.outcome
    return dict(sorted(found.items()))


def summary(tests: list[Result], **about: object) -> dict:
    """JSON-ready: `about` and what became of the tests."""
    by_outcome = Counter(test.outcome for test in tests)
    return {
        **about,
        **{outcome: by_outcome[outcome] for outcome in ("passed", "failed", "skipped")},
        "families": families(tests),
        "failures": [{"test": test.name, "error": test.why} for test in tests if test.outcome == "failed"],
        "skipped_because": dict(Counter(test.why for test in tests if test.outcome == "skipped").most_common()),
    }


def run(folder: str, host: Path, options: list[str], jobs: int, deadline: float) -> list[Result]:
    """Run pytest over a folder until `deadline` (of `time.monotonic`); whatever ends it early is a failed test."""
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch) / "junit.xml"
        command = [sys.executable, "-m", "pytest", folder, "-q", "--tb=short", f"--junitxml={junit}", *options]
        if jobs > 1:
            command += ["-n", str(jobs), "--dist", "worksteal"]
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        environment = {**os.environ, "COMFYUI_PATH": str(host), "OMP_NUM_THREADS": threads}
        options = {"env": environment, "start_new_session": True, "preexec_fn": _listen_to_interrupts}
        process = subprocess.Popen(command, cwd=ROOT, **options)
        stopped = False
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # As Ctrl-C does: pytest still writes what it has. What does not listen is ended.
            stopped = True
            process.send_signal(signal.SIGINT)
            try:
                code = process.wait(30)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
        finally:
            _end(process)
        tests = read_junit(junit, folder) if junit.is_file() else []
        if stopped:
            tests.append(Result(folder, "failed", "stopped: the time was up"))
        elif code not in (*WENT_WELL, NOTHING_CHOSEN) or (code == 1 and all(t.outcome != "failed" for t in tests)):
            tests.append(Result(folder, "failed", f"pytest ended with code {code}"))
        return tests


def _listen_to_interrupts() -> None:
    """In the child: a shell that runs this in the background has it ignore Ctrl-C, and would have pytest do so too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen) -> None:
    """End what is left of a session, its workers included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def commit() -> str:
    """The commit of this checkout, or `unknown` where it is none."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def default_jobs() -> int:
    """How many workers: half the cores, since each also compiles in threads of its own; one without pytest-xdist."""
    return min(MOST_JOBS, max(1, (os.cpu_count() or 1) // 2)) if importlib.util.find_spec("xdist") else 1


def check(host: Path, options: list[str], jobs: int, timeout: float, commit: str) -> dict:
    """Run all phases and say what became of them, with the names and versions of what they ran on."""
    import torch
    import triton

    began = time.monotonic()
    about = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "comfyui": host_version(host),
        "commit": commit,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), f"{jobs} at a time", sep=", ", flush=True)
    tests = []
    for folder in PHASES:
        print(f"{folder}:", flush=True)
        tests += run(folder, host, options, jobs, began + timeout)
    return summary(tests, **about, seconds=round(time.monotonic() - began, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", type=Path, required=True, help="a ComfyUI checkout")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--only", metavar="PATTERN", help="only tests that pytest's -k chooses by this pattern")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="tests at a time (needs pytest-xdist)")
    parser.add_argument("--timeout", type=float, default=480, help="seconds after which what is left counts as failed")
    parser.add_argument("--commit", default=commit(), help="where this is no git checkout: the commit it is of")
    arguments = parser.parse_args()
    if not is_host(arguments.host):
        parser.error(f"--host: {arguments.host} is not a ComfyUI checkout")
    import torch

    if not torch.cuda.is_available():
        parser.error("no GPU: there is nothing to check; python scripts/test.py runs what a CPU can")
    options = ["-k", arguments.only] if arguments.only else []
    result = check(arguments.host.resolve(), options, arguments.jobs, arguments.timeout, arguments.commit)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for failure in result["failures"]:
        print(f"FAILED {failure['test']}: {failure['error']}")
    for reason, count in result["skipped_because"].items():
        print(f"skipped {count}: {reason}")
    print(f"{result['seconds']:.0f} s")
    print(f"{result['passed']} passed, {result['failed']} failed")
    return int(result["failed"] > 0 or result["passed"] == 0)


if __name__ == "__main__":
    raise SystemExit(main())
