"""Whole runs in the product's own flow with the time their attention takes, all clips of a run at once."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels.attention.cudnn import cudnn_attention, cudnn_serves
from ...paro_runtime.plan.plan import Plan, Site
from ...paro_runtime.run.evaluation import Evaluation
from ...paro_runtime.run.session import Session
from .bed import LargeBench

# Shown every self-attention call before the session answers it: evaluation, site, q, k, v.
Before = Callable[[Evaluation, Site, torch.Tensor, torch.Tensor, torch.Tensor], None]


# How long a GPU is kept busy before a stretch, in seconds, so that the host has launched what is in it by then: this
# model's layers are too small to hide the launches of a call, those of a model with as many heads are not. The first
# is for calls that observe or choose masks.
HEAD_STARTS = (0.04, 0.008)
CYCLES_PER_SECOND = 2e9  # at most, of the GPUs that there are


class Stopwatch:
    """Seconds of named stretches of each step: between CUDA events on a GPU, which waits for nothing; else by the wall
    clock. A stretch on a GPU includes what the device idles while the host is busy inside it."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._stretches: list[tuple[str, int, tuple]] = []

    @contextmanager
    def measure(self, name: str, step: int) -> Iterator[None]:
        """Time what happens inside."""
        began = self._now()
        yield
        self._stretches.append((name, step, (began, self._now())))

    def head_start(self, seconds: float) -> None:
        """Keeps a GPU busy for about so long, while the host goes on."""
        if self._cuda:
            torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))

    def seconds(self) -> dict[tuple[str, int], float]:
        """Sums by (name, step); waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[tuple[str, int], float] = defaultdict(float)
        for name, step, (began, ended) in self._stretches:
            found[name, step] += began.elapsed_time(ended) / 1000 if self._cuda else ended - began
        return dict(found)

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Times:
    """Seconds that the attention of one run took.

    dense: of the dense steps. once: observing, making the plan and what else comes once in a run, beyond what its step
    would have taken anyway. sparse: of each sparse step, without `once`.
    """

    dense: float
    once: float
    sparse: tuple[float, ...]

    @property
    def whole(self) -> float:
        """All of it."""
        return self.dense + self.once + sum(self.sparse)

    @classmethod
    def of(cls, found: dict[tuple[str, int], float], steps: int, dense_steps: int, free: bool = False) -> Times:
        """From what a stopwatch saw of a run with so many steps and first dense ones. free: choosing masks before a
        call costs nothing.

        Without a dense step the first step observes, plans and is sparse; it counts as the median of the others, and
        the rest of it as `once`.
        """

        def of_step(name: str, step: int) -> float:
            return found.get((name, step), 0.0)

        once = sum(of_step("begin", step) for step in range(steps))
        dense = 0.0
        for step in range(dense_steps):
            host = of_step("dense", step)
            dense, once = dense + host, once + of_step("attend", step) - host
        sparse = [
            of_step("attend", step) + (0.0 if free else of_step("route", step)) for step in range(dense_steps, steps)
        ]
        if dense_steps == 0 and len(sparse) > 1:
            usual = min(sparse[0], statistics.median(sparse[1:]))
            once, sparse[0] = once + sparse[0] - usual, usual
        return cls(dense, once, tuple(sparse))


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention over every key, by cuDNN where it serves such calls; q, k, v and the result `[B, H, L, D]`."""
    if cudnn_serves(q, k, v):
        return cudnn_attention(q, k, v)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def heads_apart(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, L, D]` -> contiguous `[1, B * H, L, D]`."""
    return x.reshape(1, -1, *x.shape[2:]).contiguous()


class TimedBench(LargeBench):
    """`LargeBench` whose samplings are timed. The heads of each clip are always heads of their own, in dense runs too,
    so that dense steps compute exactly what the dense run computes."""

    def __init__(
        self,
        grid: tuple[int, int, int],
        weights: Path,
        device: str,
        seeds: tuple[int, ...],
        dtype: torch.dtype,
        steps: int,
    ) -> None:
        """steps: of every sampling; otherwise as `LargeBench`."""
        self.steps = steps
        super().__init__(grid, weights, device, seeds, dtype)

    def sample(self, seeds, session: Session | None, apart: bool = True) -> torch.Tensor:
        """See `TinyBench.sample`; `apart` makes no difference."""
        return self.timed_sample(seeds, session)[0]

    def timed_sample(
        self,
        seeds,
        session: Session | None,
        before: Before | None = None,
        edit: Callable[[Plan], Plan] | None = None,
    ) -> tuple[torch.Tensor, dict[tuple[str, int], float]]:
        """Latents, and seconds by (name, step): `attend` all of a call, `dense` the host's attention inside it,
        `begin` what the session does between steps, `route` what `before` takes. edit: changes the session's plan once
        there is one.

        As in the product results are looked at when the evaluation is over; one that is not finite raises
        FloatingPointError, since benchmarks are strict.
        """
        context, noise = self.start(seeds)
        watch = Stopwatch(self.device)
        step, evaluation, edited = 0, None, edit is None

        def attention(q, k, v, *, layer):
            shape = q.shape
            q, k, v = map(heads_apart, (q, k, v))

            def dense():
                with watch.measure("dense", step):
                    return dense_attention(q, k, v)

            if evaluation is None:
                watch.head_start(HEAD_STARTS[1])
                return dense().reshape(shape)
            site = Site("block", layer)
            looks = before is not None or step == max(0, session.schedule.dense_steps - 1)
            watch.head_start(HEAD_STARTS[0 if looks else 1])
            if before is not None:
                with watch.measure("route", step):
                    before(evaluation, site, q, k, v)
            with watch.measure("attend", step):
                out = evaluation.attend(site, q, k, v, dense=dense, blocks=self.layers)
            return out.reshape(shape)

        def on_step(number, sigma):
            nonlocal step, evaluation, edited
            step = number
            if session is None:
                return
            if evaluation is not None:
                evaluation.end()
            with watch.measure("begin", step):
                attempt = session.attempt(can_redo=True)
                evaluation = session.begin(layout=self.layout, sigma=sigma, attempt=attempt)
            grid = session._grids[self.layout.grid]
            if not edited and grid.plan is not None:
                grid.plan, edited = edit(grid.plan), True

        latents = self._sample(context, noise, attention, on_step)
        if evaluation is not None:
            evaluation.end()
        return latents, watch.seconds()

    def time_dense(self, repeats: int) -> float:
        """Median seconds that the attention of a dense run takes; the first such run was when this object was made."""
        runs = [sum(self.timed_sample(self.seeds, None)[1].values()) for _ in range(repeats)]
        return statistics.median(runs)
