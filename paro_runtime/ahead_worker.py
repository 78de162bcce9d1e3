"""Compiles what a run needs, in a process of its own: `python ahead_worker.py JSON`, which `ahead` starts.

The JSON has `root` (the pack), `job` (`rehearsal.Job`) and `markers`, two files: the first is made when everything is
compiled but what has a stand-in, the second when that is too. Exit status 1 and a line for each failure if not all
could be.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path

PACKAGE = "paro_ahead"
# Rough seconds of compiling, for sharing the work; others take about one.
SECONDS = {"gluon_forward": 8, "_block_costs": 2, "_row_sums": 2, "attention_forward": 2}
MOST_WORKERS = 12
Key = tuple[str, str]


def shares(keys: Iterable[Key], count: int) -> list[list[Key]]:
    """Launches for each of at most `count` workers, the longest ones first."""
    bins: list[list[Key]] = [[] for _ in range(max(1, count))]

    def seconds(key: Key) -> float:
        return SECONDS.get(key[0], 1)

    for key in sorted(keys, key=seconds, reverse=True):
        min(bins, key=lambda b: sum(map(seconds, b))).append(key)
    return [b for b in bins if b]


def _compile(launches: dict[Key, Callable], keys: Iterable[Key]) -> bool:
    good = True
    for key in keys:
        try:
            _prepare_launch(launches[key]())
        except Exception as error:  # the run itself finds out, and has another kernel for it
            print(f"{key[0]}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
            good = False
    return good


def _prepare_launch(kernel) -> None:
    """Build the little C module that launches a compiled kernel, as some versions of Triton do when it first runs."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:  # where it is another way, or no C compiler: the run does it, or fails with the reason
        print(f"launcher: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)


def _compile_all(launches: dict[Key, Callable], late: set[Key], markers: list[Path], count: int) -> bool:
    """By processes where the system forks them, which share what is loaded by now; otherwise one after the other."""
    parts = [[key for key in launches if key not in late], [key for key in launches if key in late]]
    if not hasattr(os, "fork") or count < 2:
        good = True
        for keys, marker in zip(parts, markers, strict=True):
            good &= _compile(launches, keys)
            marker.touch()
        return good
    # What is late takes longest and is begun first, by a quarter of the workers.
    for_late = -(-count // 4)
    children: dict[int, int] = {}
    for part, workers in ((1, for_late), (0, count - for_late)):
        for keys in shares(parts[part], workers):
            child = os.fork()
            if child == 0:
                os._exit(0 if _compile(launches, keys) else 1)
            children[child] = part
    good = True
    while children:
        child, status = os.wait()
        good &= status == 0
        part = children.pop(child, None)
        if part is not None and part not in children.values():
            markers[part].touch()
    for marker in markers:
        if not marker.exists():  # there was nothing of its kind
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
    # Parts of an observation that launch no kernel of ours, and take a CPU most of the time.
    statistics = importlib.import_module(f"{PACKAGE}.paro_runtime.statistics")
    statistics.observe_falloff = statistics.logit_errors = lambda *args, **kwargs: None
    job = rehearsal.Job.from_dict(task["job"])
    launches = compile_only.pretend(job.capability)
    good = True
    try:
        with torch.inference_mode():
            rehearsal.rehearse(job, launches)
    except Exception as error:  # what was launched until then is compiled all the same
        print(f"rehearsal: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
        good = False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rehearsed = time.process_time()
    count = min(MOST_WORKERS, max(1, cores - 1))
    good &= _compile_all(launches.compile, launches.late, [Path(m) for m in task["markers"]], count)
    print(f"{len(launches.compile)} kernels, {rehearsed:.1f} s before the first, {count} workers", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
