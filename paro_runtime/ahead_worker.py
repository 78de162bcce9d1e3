"""Compiles what a run needs, in a process of its own: `python ahead_worker.py JSON`, which `ahead` starts.

The JSON has `root` (the pack), `job` (`rehearsal.Job`) and `markers`, two files that are made when everything but the
kernels named LATE is compiled, and when those are. Exit status 1 and a line for each failure if not all could be.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path

PACKAGE = "paro_ahead"
# Rough seconds of compiling, for sharing the work; others take about one.
SECONDS = {"gluon_forward": 8, "_block_costs": 2, "_row_sums": 2, "attention_forward": 4, "_expand": 3}
# Compiled last to arrive: a call that would use these runs on another kernel until then.
LATE = ("gluon_forward",)
MOST_WORKERS = 8


def shares(names: Iterable[str], count: int) -> list[list[str]]:
    """Kernels for each of at most `count` workers, LATE ones in workers of their own where there are two or more."""
    rest = sorted((n for n in names if n not in LATE), key=lambda n: -SECONDS.get(n, 1))
    late = [[n] for n in names if n in LATE]
    bins: list[list[str]] = [[] for _ in range(max(1, min(count - len(late), len(rest))))]
    for name in rest:
        min(bins, key=lambda b: sum(SECONDS.get(n, 1) for n in b)).append(name)
    return [*late, *filter(None, bins)]


def _compile(by_kernel: dict[str, list[Callable]], names: Iterable[str]) -> bool:
    good = True
    for name in names:
        for compile_it in by_kernel[name]:
            try:
                compile_it()
            except Exception as error:  # the run itself finds out, and has another kernel for it
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
                good = False
    return good


def _compile_all(by_kernel: dict[str, list[Callable]], markers: list[Path], count: int) -> bool:
    """By processes where the system forks them, which share what is loaded by now; otherwise one after the other."""
    if not hasattr(os, "fork") or count < 2:
        late = [n for n in by_kernel if n in LATE]
        good = _compile(by_kernel, [n for n in by_kernel if n not in LATE])
        markers[0].touch()
        good &= _compile(by_kernel, late)
        markers[1].touch()
        return good
    children = {}
    for names in shares(by_kernel, count):
        child = os.fork()
        if child == 0:
            os._exit(0 if _compile(by_kernel, names) else 1)
        children[child] = names[0] in LATE
    good = True
    while children:
        child, status = os.wait()
        good &= status == 0
        late = children.pop(child, True)
        for marker, kind in zip(markers, (False, True), strict=True):
            if late == kind and kind not in children.values():
                marker.touch()
    for marker in markers:
        marker.touch()
    return good


def main() -> int:
    # Python puts a script's own folder first, whose `statistics` is not the standard library's.
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
    task = json.loads(sys.argv[1])
    # The pack under a name of this process's own, without what its __init__ offers to the host.
    package = types.ModuleType(PACKAGE)
    package.__path__ = [task["root"]]
    sys.modules[PACKAGE] = package
    import torch

    torch.set_num_threads(1)
    compile_only = importlib.import_module(f"{PACKAGE}.kernels.compile_only")
    rehearsal = importlib.import_module(f"{PACKAGE}.paro_runtime.rehearsal")
    job = rehearsal.Job.from_dict(task["job"])
    launches = compile_only.pretend(job.capability)
    good = True
    try:
        with torch.inference_mode():
            rehearsal.rehearse(job)
    except Exception as error:  # what was launched until then is compiled all the same
        print(f"rehearsal: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
        good = False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    good &= _compile_all(launches.by_kernel, [Path(m) for m in task["markers"]], min(MOST_WORKERS, max(1, cores - 1)))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
