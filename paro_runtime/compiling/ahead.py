"""Compiling ahead: kernels that are not in Triton's cache yet are compiled by another process while the run goes on.

Compiling all that a run needs takes half a minute of one core, once for every GPU and version of Triton. Until it is
done a run keeps to the host's attention; a process of its own, because threads would hold up the one that launches.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from ...kernels.core.layout import TokenLayout
from ..plan.options import query_block
from .rehearsal import LARGE, Job
from .self_check import problem

log = logging.getLogger("paro")
ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
POLL_SECONDS = 0.02
# This environment variable at 0: each kernel is compiled when it is first called, and the run waits for it.
SWITCH = "PARO_COMPILE_AHEAD"
# What the worker must not have: a GPU, whose context would take memory, and Triton's interpreter.
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}


def cache_folder() -> Path:
    """Where Triton keeps what it has compiled."""
    try:
        from triton import knobs

        return Path(knobs.cache.dir)
    except (ImportError, AttributeError):  # before Triton 3.4
        return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


@functools.cache
def _code() -> str:
    """Digest of all that decides what is compiled, beside the job."""
    import torch
    import triton

    total = hashlib.sha256(f"{triton.__version__} {torch.__version__} {sys.version}".encode())
    for folder in ("kernels", "paro_runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()


class Ahead:
    """The kernels of one job: compiled, or being compiled. Safe to ask from several threads."""

    def __init__(self, job: Job, folder: Path) -> None:
        """Starts the worker if the markers in `folder`, Triton's cache, do not say that it has done this job before."""
        task = asdict(job)
        name = hashlib.sha256((_code() + json.dumps(task)).encode()).hexdigest()[:24]
        self._markers = [folder / f"paro-{name}-{part}" for part in ("compiled", "late")]
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._errors: IO[bytes] | None = None
        self._began = time.perf_counter()
        if not all(marker.is_file() for marker in self._markers):
            self._start(task, folder)

    def _start(self, task: dict, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"root": str(ROOT), "job": task, "markers": [str(marker) for marker in self._markers]})
        environment = {**os.environ, **WITHOUT_GPU, "TRITON_CACHE_DIR": str(folder)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in _end
        flags, nowhere = 0, subprocess.DEVNULL
        if sys.platform == "win32":
            flags = subprocess.CREATE_NO_WINDOW | subprocess.BELOW_NORMAL_PRIORITY_CLASS
        log.info("PARO: compiling kernels in the background (once on this machine)")
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), text], env=environment, creationflags=flags,
            stdin=nowhere, stdout=nowhere, stderr=self._errors,
        )  # fmt: skip

    def ready(self) -> bool:
        """Whether a run may use the kernels. Also once the worker has given up: then they are compiled as they come."""
        return self._has(0)

    def late_ready(self) -> bool:
        """The same for the kernels that have a stand-in."""
        return self._has(1)

    def _has(self, part: int) -> bool:
        with self._lock:
            if self._process is None:
                return True
            if self._process.poll() is not None:
                self._end()
                return True
        return self._markers[part].is_file()

    def _end(self) -> None:
        status, self._process = self._process.returncode, None
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self._errors.close()
        if status:
            first = said[0] if said else f"exit status {status}"
            log.warning("PARO: not all kernels could be compiled ahead, they are when they are needed (%s)", first)
        else:
            log.info("PARO: kernels compiled in %.0f s (%s)", time.perf_counter() - self._began, " ".join(said[-1:]))

    def wait(self, seconds: float, late: bool = False) -> bool:
        """`ready` (or `late_ready`), waited for at most so long."""
        until = time.perf_counter() + seconds
        while not self._has(int(late)):
            if time.perf_counter() >= until:
                return False
            time.sleep(POLL_SECONDS)
        return True


def wait_for_all(seconds: float) -> bool:
    """Whether everything that was begun is compiled, waited for at most so long."""
    with _lock:
        known = list(_known.values())
    deadline = time.perf_counter() + seconds
    return all(found.wait(deadline - time.perf_counter(), late=True) for found in known)


def load_early(job: Job) -> None:
    """What the first calls of a process load beside the kernels, half a dense step's worth of time together: modules,
    Triton's driver and its digest of itself, and what the self-check compares with. Raises what these raise."""
    import torch

    if torch.cuda.is_available():
        from triton.runtime.driver import driver

        for path in sorted((ROOT / "kernels").rglob("*.py")):
            # Some need a newer Triton than there is; whoever calls them says so.
            with suppress(ImportError, AttributeError):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                importlib.import_module(f"...{name}", __package__)
        driver.active.get_current_target()
        for place in ("triton.runtime.cache", "triton.compiler.compiler"):  # since and before Triton 3.5
            digest = getattr(importlib.import_module(place), "triton_key", None)
            if digest is not None:
                digest()
                break
    problem(getattr(torch, job.dtype), job.head_dim, query_block(TokenLayout(0, job.grid).grid_tokens), job.pool)


def _load_beside(job: Job) -> None:
    def load() -> None:
        try:
            load_early(job)
        except Exception as error:  # whoever needs it meets it again, and says so
            log.debug("PARO: nothing is loaded early (%s: %s)", type(error).__name__, error)

    threading.Thread(target=load, name="paro-load-early", daemon=True).start()


def at_start() -> threading.Thread:
    """Compile what most runs need while the host starts, in the background, if this machine has not done so yet.

    Returns the thread that sees to it. Without an NVIDIA GPU that the kernels serve it does nothing.
    """
    thread = threading.Thread(target=_compile_usual, name="paro-compile-at-start", daemon=True)
    thread.start()
    return thread


def _compile_usual() -> None:
    try:
        job = usual_job()
        if job is not None:
            ahead_of(job)
    except Exception as error:  # a convenience: the first run does it otherwise
        log.warning("PARO: kernels are not compiled at the start (%s: %s)", type(error).__name__, error)


def usual_job() -> Job | None:
    """What a video model with 128 channels a head needs in bfloat16 on this machine's GPU; None without a fit one."""
    import torch

    from ...kernels.core.dispatch import capability_of_gpu, resolve, resolve_precision
    from ...kernels.core.layout import BLOCK_K
    from ...kernels.core.precision import PRECISIONS

    device = torch.device("cuda")
    if not torch.cuda.is_available() or os.environ.get(SWITCH) == "0":
        return None
    capability, precision = capability_of_gpu(device), resolve_precision("auto", "auto", device)
    if capability is None or resolve("triton", device, torch.bfloat16, 128, PRECISIONS[precision]).reason is not None:
        return None
    return Job(capability, "bfloat16", 128, 1, 1, 0, LARGE[0], 0, False, precision, "mass", BLOCK_K)


_known: dict[tuple[Job, Path], Ahead] = {}
_lock = threading.Lock()


def ahead_of(job: Job) -> Ahead:
    """The state of a job's kernels; the first to ask starts the compiling. Raises OSError where no process can be
    started or the cache cannot be written."""
    key = (job.small(), cache_folder())
    with _lock:
        if key not in _known:
            _known[key] = Ahead(*key)
            _load_beside(key[0])
        return _known[key]
