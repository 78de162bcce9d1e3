"""The kernels' patterns of planned sites, kept on the device while they are in use, as far as memory allows.

In use are those of one group of steps: a run moves from group to group and hardly ever back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from ...kernels.attention.block_lists import held_bytes
from ...kernels.core.pattern import SparsePattern
from ..plan.plan import Plan, Site
from ..plan.token_layout import TokenLayout
from .backend import pattern_of

# Patterns stay on the device up to about this share of its memory: the 40 sites of a 14B model at 720p, 4.2 MB each, do
# so on any GPU of 12 GB or more. What does not fit is made anew in every call.
CACHE_SHARE = 1 / 64
CACHE_BYTES = 1 << 30  # where the device does not tell its memory


class PatternCache:
    """Patterns of one group of steps by site, layout and device. Safe to call from several threads."""

    def __init__(self) -> None:
        self._groups: dict[TokenLayout, int] = {}
        self._patterns: dict[tuple, SparsePattern] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._patterns)

    def get(
        self,
        site: Site,
        plan: Plan,
        group: int,
        layout: TokenLayout,
        kv_heads: int,
        device: torch.device,
        measure: Callable[[SparsePattern], torch.Tensor] | None = None,
    ) -> SparsePattern:
        """The site's pattern in a group of steps. Asking for another group of a layout drops the patterns of the one
        before. measure: as in `pattern_of`; what does not fit is measured anew every time."""
        key = (site, layout, device)
        with self._lock:
            if self._groups.get(layout) != group:
                self._drop(layout)
                self._groups[layout] = group
            pattern = self._patterns.get(key)
        if pattern is None:
            sizes = {"block_q": plan.block_q, "pool": plan.pool, "expansions": plan.expansions, "kv_heads": kv_heads}
            pattern = pattern_of(plan.sites[site], layout, group=group, device=device, measure=measure, **sizes)
            self._keep(key, group, pattern)
        return pattern

    def drop(self, site: Site, layout: TokenLayout) -> None:
        """Make the site's pattern anew when it is asked for."""
        with self._lock:
            self._drop(layout, site)

    def saved(self) -> Callable[[], None]:
        """What drops the patterns that are made from now on. Those of another group of steps are not brought back: who
        goes back goes back within a step."""
        with self._lock:
            groups, keys = dict(self._groups), set(self._patterns)

        def restore() -> None:
            with self._lock:
                for key in list(self._patterns):
                    if key not in keys or groups.get(key[1]) != self._groups.get(key[1]):
                        self._bytes -= _size(self._patterns.pop(key))

        return restore

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._patterns.clear()
            self._groups.clear()
            self._bytes = 0

    def _drop(self, layout: TokenLayout, site: Site | None = None) -> None:
        for key in [key for key in self._patterns if key[1] == layout and site in (None, key[0])]:
            self._bytes -= _size(self._patterns.pop(key))

    def _keep(self, key: tuple, group: int, pattern: SparsePattern) -> None:
        size = _size(pattern)
        with self._lock:
            if self._groups.get(key[1]) != group:  # another thread has gone on to the next group
                return
            # Sites come round in the same order in every evaluation: dropping the oldest would drop each just before
            # it is wanted again, so what does not fit is made anew every time instead.
            if self._bytes + size <= cache_bytes(pattern.kept_words.device):
                self._patterns[key] = pattern
                self._bytes += size


def with_bias(pattern: SparsePattern, bias: torch.Tensor | None) -> SparsePattern:
    """The pattern with `bias` `[heads]` in place of its own, where there are both. What the kernels derive from the
    kept blocks goes by their words, and so travels along."""
    if bias is None or pattern.tail_bias is None:
        return pattern
    return replace(pattern, tail_bias=bias.to(pattern.tail_bias.device))


def _size(pattern: SparsePattern) -> int:
    return held_bytes(pattern.geometry, pattern.kept_words.shape[0])


def cache_bytes(device: torch.device) -> int:
    """Bytes that a run may keep on a device for one purpose."""
    if device.type != "cuda":
        return CACHE_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory * CACHE_SHARE)
