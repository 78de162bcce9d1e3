"""Where the time of a run goes: marks in the device's stream wherever another part of the work begins.

The device's time between two marks belongs to the part that began at the first, waiting for the host included. So the
parts are exclusive however they nest, they add up to the whole run, work of the host that the device never waited for
counts as nothing, and nothing is synchronised while the run is timed.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

REST = "rest_of_model"
PACK = "comfyui_paro.paro_runtime"
# Part -> what is timed for it, as module:attribute. What begins with "?" may be missing.
HOOKS = {
    "observing": (f"{PACK}.calibration.calibrator:Calibrator.observe",),
    "planning": (f"{PACK}.run.grid_run:GridPlans.close_calibration",),
    "bias": (f"{PACK}.run.tail_bias:TailBiasUpdate.measure", f"{PACK}.run.tail_bias:TailBiasUpdate.judge"),
    "masks": (f"{PACK}.run.evaluation:routed_bits",),
    "loading_plan": (
        f"{PACK}.plan.store:PlanStore.find",
        f"{PACK}.run.grid_run:GridPlans.receive",
        f"{PACK}.attention.patterns:PatternCache.get",
    ),
    # With what is waited for and with the self-check, which loads what was compiled.
    "compiling": (
        f"{PACK}.compiling.readiness:Readiness._decide",
        "?triton.runtime.jit:JITFunction._do_compile",
    ),
    "sparse_attention": (
        f"{PACK}.run.evaluation:run_kernel",
        "?comfy_kitchen:sol_attn",
        "?comfy_kitchen:sol_attn_chunked",
    ),
    # In runs without PARO the host's attention is timed in its override slot, see `attentions.watch`.
    "dense_attention": (f"{PACK}.host.override:run_host", f"{PACK}.attention.dense:cudnn_attention"),
}
PARTS = ("dense_attention", "sparse_attention", REST, "observing", "planning", "masks")
PARTS += ("bias", "compiling", "loading_plan")


class HookMissingError(RuntimeError):
    """A function that a part's time is taken from is not there any more; the message names all of them."""


class Timeline:
    """Marks of one run at a time. Calls from threads other than the one that began the run are not seen."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, str]] = []
        self._stack: list[str] = []
        self._steps: list[Any] = []
        self._thread: int | None = None
        self._stream: torch.cuda.Stream | None = None

    def _stamp(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        # In the stream that the run began in, even where work on the side has made another the current one.
        event.record(self._stream)
        return event

    def begin(self) -> None:
        self._thread = threading.get_ident()
        self._stream = torch.cuda.current_stream() if self._cuda else None
        self._stack = [REST]
        first = self._stamp()
        self._marks, self._steps = [(first, REST)], [first]

    def step(self) -> None:
        """A sampling step is over."""
        self._steps.append(self._stamp())

    def end(self) -> None:
        self._marks.append((self._stamp(), ""))
        self._thread = None
        if self._cuda:
            torch.cuda.synchronize()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this part, except for parts that begin inside."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._stack.append(name)
        self._marks.append((self._stamp(), name))
        try:
            yield
        finally:
            self._stack.pop()
            self._marks.append((self._stamp(), self._stack[-1]))

    def timed(self, name: str | Callable[..., str], function: Callable) -> Callable:
        """`function`, its time counted for a part; name may choose the part from the call's arguments."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        return call

    def _between(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) / 1000 if self._cuda else second - first

    def parts(self) -> dict[str, float]:
        """Seconds of every part; together they are the run."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for (first, name), (second, _) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] += self._between(first, second)
        return seconds

    def step_seconds(self) -> list[float]:
        return [self._between(a, b) for a, b in zip(self._steps, self._steps[1:], strict=False)]


def _kernel_part(q: Any, k: Any, v: Any, pattern: Any, *rest: Any, **options: Any) -> str:
    """PARO's kernel runs dense steps too: without a list of kept blocks."""
    return "dense_attention" if pattern.kept_words is None else "sparse_attention"


@contextmanager
def hooked(timeline: Timeline) -> Iterator[None]:
    """Time every function of `HOOKS`, and put them back afterwards. Raises HookMissingError."""
    found, missing = [], []
    for part, places in HOOKS.items():
        for place in places:
            module_name, _, path = place.lstrip("?").partition(":")
            *outer, name = path.split(".")
            try:
                owner = functools.reduce(getattr, outer, importlib.import_module(module_name))
                found.append((owner, name, getattr(owner, name), part))
            except (ImportError, AttributeError):
                missing += [] if place.startswith("?") else [place]
    if missing:
        raise HookMissingError(f"not there any more: {', '.join(missing)}; HOOKS in {__name__} must follow the code")
    try:
        for owner, name, function, part in found:
            chosen = _kernel_part if name == "run_kernel" else part
            setattr(owner, name, timeline.timed(chosen, function))
        yield
    finally:
        for owner, name, function, _ in found:
            setattr(owner, name, function)


class HostMemory:
    """How far this process's resident memory rises above where it was; None where the system does not tell.

    of_files_gb: what of that is pages of files, such as libraries and the kernels in them, which the system takes back
    when it wants them.
    """

    STATUS = Path("/proc/self/status")
    INTERVAL = 0.02

    def __enter__(self) -> HostMemory:
        self.grown_gb: float | None = None
        self.of_files_gb: float | None = None
        self._first = self._highest = self._resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._first is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._first is not None:
            self._thread.join()
            highest = max(self._highest, self._resident())
            self.grown_gb, self.of_files_gb = ((a - b) / 1e9 for a, b in zip(highest, self._first, strict=True))

    def _resident(self) -> tuple[int, int] | None:
        """Bytes, and what of them is pages of files."""
        if not self.STATUS.is_file():
            return None
        lines = dict(line.split(":", 1) for line in self.STATUS.read_text().splitlines())
        return tuple(1024 * int(lines[name].split()[0]) for name in ("VmRSS", "RssFile"))

    def _watch(self) -> None:
        while not self._over.wait(self.INTERVAL):
            self._highest = max(self._highest, self._resident())
