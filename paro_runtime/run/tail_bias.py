"""The tail's bias, measured again while sampling, and the error of the sparse attention.

A plan's bias was measured at other noise levels, or on other prompts. Some of the rows are enough to measure it on the
very queries and keys at hand. It belongs to the mask it was measured under, and hardly drifts beside: the
first step of each group of steps measures it anew, and more often gains nothing (`docs/method.md`). The exact output of
these rows comes with it, which the sparse result is compared with.

On a GPU measuring takes dozens of launches a call, whatever its size: short calls are measured once in a run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager

import torch

from ...kernels.core.gather import take_rows
from ...kernels.core.inputs import ScoreInputs
from ...kernels.core.pattern import SparsePattern
from ..calibration.tail_fit import BiasObservation, best_bias, measured_rows, observe_bias

# Multiply-adds of a call's dense attention below which a call is short on a GPU: 10 ms on an H100.
LEAST_WORK = 3e12


def is_short(q: torch.Tensor) -> bool:
    """Whether measuring in more than one step would take longer than it is worth; q `[B, H, L, D]`."""
    batch, heads, length, dim = q.shape
    return q.is_cuda and 2 * batch * heads * length * length * dim < LEAST_WORK


def restoring(lock: AbstractContextManager, known: Sequence[dict]) -> Callable[[], None]:
    """What puts these dicts, which the lock guards, back to how they are now; their values are never changed."""
    copies = [dict(one) for one in known]

    def restore() -> None:
        with lock:
            for one, copy in zip(known, copies, strict=True):
                one.clear()
                one.update(copy)

    return restore


class TailBiasUpdate:
    """Biases of one run by site. Safe to call from several threads."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, tuple[int, int]] = {}  # the present group, and the step it is measured in
        self._errors: dict[Hashable, tuple[int, torch.Tensor]] = {}
        self._biases: dict[Hashable, torch.Tensor] = {}
        self._wrong: dict[tuple[Hashable, int], torch.Tensor] = {}  # squared error and squared output, [2]
        self._lock = threading.Lock()

    def due(self, key: Hashable, step: int, group: int, once: bool) -> bool:
        """Whether this site is measured in this step, which is one of this group of steps: in the group's first that is
        asked about, or, once, in that of the first group alone."""
        with self._lock:
            present = self._groups.get(key)
            if present is None or (present[0] != group and not once):
                # What is carried over a change of masks is no longer measured under them.
                self._groups[key] = (group, step)
                self._errors.pop(key, None)
                self._biases.pop(key, None)
            return self._groups[key][1] == step

    def measure(
        self,
        key: Hashable,
        step: int,
        scores: ScoreInputs,
        v: torch.Tensor,
        pattern: SparsePattern,
        backend: str = "auto",
    ) -> BiasObservation:
        """Measure the bias on this call; calls of one step (conditionings that the host runs apart) add up."""
        g = pattern.geometry
        inputs = scores.with_values(v, g, pattern.tables_of_heads(scores.heads))
        sizes = {"pool": pattern.pool, "expansions": pattern.expansions, "rows": measured_rows(g.grid_tokens)}
        seen = observe_bias(inputs, pattern.mask, **sizes, backend=backend)
        errors = seen.errors
        with self._lock:
            before = self._errors.get(key)
            if before is not None and before[0] == step:
                errors = errors + before[1].to(errors.device)
            self._errors[key] = (step, errors)
            self._biases[key] = best_bias(errors)
        return seen

    def judge(self, key: Hashable, step: int, seen: BiasObservation, out: torch.Tensor) -> None:
        """Compare a call's sparse result `[B, Hq, L, D]` with what `measure` saw of the same call; calls of one step
        add up."""
        error = seen.exact - take_rows(out, seen.rows).float()
        sums = torch.stack([error.square().sum(), seen.exact.square().sum()])
        with self._lock:
            before = self._wrong.get((key, step))
            self._wrong[key, step] = sums if before is None else sums + before.to(sums.device)

    @property
    def error(self) -> tuple[float, float] | None:
        """Relative L2 error of the sparse attention on the rows that were looked at: of all sites and steps together,
        and of the worst site in one step. None where nothing was measured."""
        with self._lock:
            found = list(self._wrong.values())
        if not found:
            return None
        wrong, whole = torch.stack([sums.cpu() for sums in found]).unbind(1)
        whole = whole.clamp_min(1e-20)
        return float((wrong.sum() / whole.sum()).sqrt()), float((wrong / whole).sqrt().max())

    def _all(self) -> tuple[dict, ...]:
        return self._groups, self._errors, self._biases, self._wrong

    def saved(self) -> Callable[[], None]:
        """What puts everything back to how it is now."""
        with self._lock:
            return restoring(self._lock, self._all())

    def bias(self, key: Hashable) -> torch.Tensor | None:
        """float32 `[Hq]`, or None if the site was never measured."""
        return self._biases.get(key)
