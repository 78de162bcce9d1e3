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
from collections.abc import Callable
from pathlib import Path

PACKAGE = "paro_ahead"
# Rough seconds of compiling, by which the longest are begun first; others take about one.
SECONDS = {"gluon_forward": 6, "attention_forward": 3, "_block_costs": 2, "_row_sums": 2}
MOST_AT_ONCE = 16


class Compilers:
    """Compiles functions side by side: each in a process forked from this one, which shares what is loaded by then.

    Where the system does not fork, or for one at a time, they wait for `finish` and run in this process.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once if hasattr(os, "fork") else 0
        self._waiting: list[tuple[float, Callable[[], bool], str]] = []
        self._running: dict[int, str] = {}
        self.good = True

    def add(self, name: str, compile_it: Callable[[], bool], part: str) -> None:
        """Compile this, now or later; `compile_it` says whether it went well, and prints why not."""
        self._waiting.append((SECONDS.get(name, 1), compile_it, part))
        self._collect(block=False)
        self._begin()

    def finish(self, over: Callable[[str], None], parts: tuple[str, ...]) -> bool:
        """Wait for all that was added; over: called with the name of each part when nothing of it is left. Returns
        whether all went well."""
        open_parts = list(parts)
        while True:
            left = {*self._running.values(), *(part for *_, part in self._waiting)}
            for part in [part for part in open_parts if part not in left]:
                open_parts.remove(part)
                over(part)
            if not left:
                return self.good
            if self._running:
                self._collect(block=True)
                self._begin()
            else:  # the first part first
                self._waiting.sort(key=lambda waiting: parts.index(waiting[2]))
                self.good &= self._waiting.pop(0)[1]()

    def _begin(self) -> None:
        self._waiting.sort(key=lambda waiting: -waiting[0])
        while self._waiting and len(self._running) < self._at_once:
            _, compile_it, part = self._waiting.pop(0)
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    status = 0 if compile_it() else 1
                finally:
                    os._exit(status)
            self._running[child] = part

    def _collect(self, block: bool) -> None:
        """Take note of children that have ended; block: wait for one."""
        while self._running:
            child, status = os.waitpid(-1, 0 if block else os.WNOHANG)
            if child == 0:
                return
            self.good &= status == 0
            self._running.pop(child, None)
            block = False


def _compile(name: str, compile_it: Callable) -> bool:
    try:
        kernel = compile_it()
    except Exception as error:  # the run itself finds out, and has another kernel for it
        print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
        return False
    _prepare_launch(kernel)
    return True


def _prepare_launch(kernel) -> None:
    """Build the little C module that launches a compiled kernel, as some versions of Triton do when it first runs."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:  # where it is another way, or no C compiler: the run does it, or fails with the reason
        print(f"launcher: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)


def main() -> int:
    # Python puts a script's own folder first, whose modules may have names of the standard library's.
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
    task = json.loads(sys.argv[1])
    # The pack under a name of this process's own, without what its __init__ offers to the host.
    package = types.ModuleType(PACKAGE)
    package.__path__ = [task["root"]]
    sys.modules[PACKAGE] = package
    import torch

    torch.set_num_threads(1)
    compile_only = importlib.import_module(f"{PACKAGE}.kernels.core.compile_only")
    rehearsal = importlib.import_module(f"{PACKAGE}.paro_runtime.compiling.rehearsal")
    # Parts of an observation that launch no kernel of ours, and take a CPU most of the time.
    observe = importlib.import_module(f"{PACKAGE}.paro_runtime.calibration.observe")
    vars(observe)["logit_errors"] = lambda *args: None
    job = rehearsal.Job.from_dict(task["job"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # One core is left to whoever waits for this.
    compilers = Compilers(min(MOST_AT_ONCE, cores - 1))
    markers = dict(zip(("first", "late"), map(Path, task["markers"]), strict=True))

    def begin(name: str, compile_it: Callable) -> None:
        compilers.add(name, lambda: _compile(name, compile_it), "late" if launches.late_from_now else "first")

    launches = compile_only.pretend(job.capability, begin)
    try:
        with torch.inference_mode():
            rehearsal.rehearse(job, launches)
    except Exception as error:  # what was launched until then is compiled all the same
        print(f"rehearsal: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
        compilers.good = False
    rehearsed = time.process_time()
    good = compilers.finish(lambda part: markers[part].touch(), tuple(markers))
    print(f"{len(launches.compile)} kernels, rehearsed in {rehearsed:.1f} s", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
