"""The tail's bias, measured again while sampling.

A plan's bias was measured at other noise levels, or on other prompts. One hundredth of the rows is enough to measure
it on the very queries and keys at hand: once in a run, in the first sparse step, or with the masks where those are
measured anew. More often gains next to nothing (`docs/method.md`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager

import torch

from ..kernels.problem import SparsePattern
from .tail import best_bias, observe_bias

ROWS_SHARE = 0.01


def restoring(lock: AbstractContextManager, known: Sequence[dict]) -> Callable[[], None]:
    """What puts these dicts, which the lock guards, back to how they are now; their values are never changed."""
    copies = [dict(one) for one in known]

    def restore() -> None:
        with lock:
            for one, copy in zip(known, copies, strict=True):
                one.clear()
                one.update(copy)

    return restore


class BiasRefresh:
    """Biases of one run by site. Safe to call from several threads."""

    def __init__(self) -> None:
        self._steps: dict[Hashable, int] = {}
        self._errors: dict[Hashable, tuple[int, torch.Tensor]] = {}
        self._biases: dict[Hashable, torch.Tensor] = {}
        self._lock = threading.Lock()

    def due(self, key: Hashable, step: int) -> bool:
        """Whether this step is the one in which the bias of this site is measured: the first that is asked about."""
        with self._lock:
            return self._steps.setdefault(key, step) == step

    def measure(
        self,
        key: Hashable,
        step: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pattern: SparsePattern,
        *,
        scale: float | None,
        key_bias: torch.Tensor | None,
        backend: str = "auto",
    ) -> None:
        """Measure the bias on this call; calls of one step (conditionings that the host runs apart) add up."""
        errors = observe_bias(
            q,
            k,
            v,
            pattern.geometry,
            pattern.tables_of_heads(q.shape[1]),
            pattern.mask,
            pool=pattern.pool,
            expansions=pattern.expansions,
            share=ROWS_SHARE,
            scale=scale,
            key_bias=key_bias,
            backend=backend,
        )
        with self._lock:
            before = self._errors.get(key)
            if before is not None and before[0] == step:
                errors = errors + before[1]
            self._errors[key] = (step, errors)
            self._biases[key] = best_bias(errors)

    def forget(self) -> None:
        """The masks are others now: everything is due again."""
        with self._lock:
            for known in self._all():
                known.clear()

    def _all(self) -> tuple[dict, ...]:
        return self._steps, self._errors, self._biases

    def saved(self) -> Callable[[], None]:
        """What puts everything back to how it is now."""
        with self._lock:
            return restoring(self._lock, self._all())

    def bias(self, key: Hashable) -> torch.Tensor | None:
        """float32 `[Hq]`, or None if the site was never measured."""
        return self._biases.get(key)
