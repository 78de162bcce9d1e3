"""Masks measured anew in a run whose plan was made of pure noise.

A run with one dense step makes its plan of what the model does with noise alone: good enough for orders, less so for
masks. So it looks once more in its second sparse step, when there is a picture to see: a few mean queries of every
query block tell which blocks are heaviest, and each head keeps those, as many as before (`docs/method.md`). A run that
goes on with another's picture looks in its first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from ..kernels.kept_words import pack_bits
from ..kernels.problem import SparsePattern
from .attention import sent
from .mean_queries import mean_query_masses
from .plan import SitePlan
from .refresh import restoring
from .selection import masks_of_counts
from .tables import Offload, empty_on_host


class SecondLook:
    """Which sites of one run have been looked at again. Safe to call from several threads.

    at_once: there is a picture from the first sparse step on.
    """

    def __init__(self) -> None:
        self.at_once = False
        self._first: dict[Hashable, int] = {}
        self._looked: dict[Hashable, int] = {}
        self._offload = Offload()
        self._lock = threading.Lock()

    def keep(self, entry: SitePlan, group: int, fresh: torch.Tensor) -> SitePlan:
        """The entry with masks fresh uint8 `[groups - group, bytes]` from this group on. They reach the CPU by
        themselves and may be read there after `finish`."""
        packed = empty_on_host(entry.packed.shape, entry.packed.dtype)
        packed[:group] = entry.packed[:group]
        with self._lock:
            self._offload.take(fresh, packed[group:])
        return replace(entry, packed=packed)

    def finish(self) -> None:
        """Everything that is kept has arrived."""
        with self._lock:
            self._offload.finish()

    def due(self, key: Hashable, step: int) -> bool:
        """Whether this call is the first of the step in which the site is looked at. Asked in every sparse call."""
        with self._lock:
            first = self._first.setdefault(key, step)
            if (step == first and not self.at_once) or key in self._looked:
                return False
            self._looked[key] = step
            return True

    def passes(self, key: Hashable, step: int) -> None:
        """A sparse call of the site in this step, in which it is not to be looked at again."""
        with self._lock:
            self._first.setdefault(key, step)

    def pending(self, key: Hashable) -> bool:
        """Whether the site's masks are still to be measured anew."""
        with self._lock:
            return key not in self._looked

    def looks(self, key: Hashable, step: int) -> bool:
        """Whether the site's masks were measured anew in this step."""
        with self._lock:
            return self._looked.get(key) == step

    @property
    def sites(self) -> int:
        """Sites whose masks were measured anew."""
        return len(self._looked)

    def forget(self) -> None:
        """The plan is another one now."""
        with self._lock:
            self._first.clear()
            self._looked.clear()

    def saved(self) -> Callable[[], None]:
        """What puts everything back to how it is now."""
        with self._lock:
            return restoring(self._lock, (self._first, self._looked))


def masks_anew(
    entry: SitePlan,
    group: int,
    q: torch.Tensor,
    k: torch.Tensor,
    pattern: SparsePattern,
    *,
    scale: float | None,
    key_bias: torch.Tensor | None,
    backend: str = "auto",
) -> torch.Tensor:
    """A site's masks from this call for this group of steps and those behind it, as many blocks of each head as before:
    packed uint8 `[groups - group, bytes]` on q's device, which nothing waits for. pattern: the entry's own in this
    group; otherwise as `sparse_attention`."""
    rest = {"scale": scale, "key_bias": key_bias, "backend": backend}
    masses = mean_query_masses(q, k, pattern.geometry, pattern.tables_of_heads(q.shape[1]), **rest)
    counts = (entry.density[group:] * masses[0].numel()).round().long()
    return torch.stack([pack_bits(mask) for mask in masks_of_counts(masses, sent(counts, masses.device))])
