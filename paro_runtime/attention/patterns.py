"""The kernels' patterns of planned sites, kept on the device while they are in use, as far as memory allows.

In use are those of one group of steps: a run moves from group to group and hardly ever back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ...kernels.attention.block_list_layout import held_bytes
from ...kernels.core.block_mask import words_of_bits
from ...kernels.core.layout import TokenLayout, geometry_of
from ...kernels.core.pattern import SparsePattern
from ..plan.orders import order_number, order_tables
from ..plan.plan import Plan, Site, SitePlan

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


def sent(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """x on the device. From ordinary memory the host would wait for all that it launched before."""
    if x.is_cuda or torch.device(device).type != "cuda":
        return x.to(device)
    try:
        return x.pin_memory().to(device, non_blocking=True)
    except RuntimeError:  # the system allows no more pinned memory
        return x.to(device)


def pinned_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor like x on the CPU, pinned where the system allows more of that; a copy to it waits
    otherwise."""
    try:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(x.shape, dtype=x.dtype)


def build_pattern(
    layout: TokenLayout,
    orders: Sequence[str],
    mask: torch.Tensor | None,
    tail_bias: torch.Tensor | None,
    *,
    block_q: int = 64,
    pool: int = 64,
    expansions: int = 0,
    kv_heads: int | None = None,
    device: torch.device | str = "cpu",
) -> SparsePattern:
    """The kernels' pattern from order names per query head, a mask `[H, q_blocks, k_blocks]` and biases `[H]`.

    With fewer key heads than query heads the heads of a group must share an order; raises ValueError if they do not.
    """
    kv_heads = kv_heads or len(orders)
    if len(orders) % kv_heads:
        raise ValueError(f"orders: {len(orders)} query heads do not group over {kv_heads} key heads")
    group = len(orders) // kv_heads
    per_key_head = list(orders[::group])
    if any(orders[i] != per_key_head[i // group] for i in range(len(orders))):
        raise ValueError("orders: query heads that share a key head must share its order")
    index = sent(torch.tensor([order_number(name) for name in per_key_head], dtype=torch.int32), device)
    tables = order_tables(layout.grid, index.device)
    bias = None if tail_bias is None else sent(tail_bias.float(), device)
    geometry = geometry_of(layout, block_q)
    if mask is None:
        return SparsePattern(geometry, tables, index, None, bias, pool, expansions)
    return SparsePattern.from_mask(geometry, tables, index, mask.to(device), bias, pool, expansions)


def pattern_of(
    entry: SitePlan,
    layout: TokenLayout,
    *,
    group: int,
    block_q: int,
    pool: int,
    expansions: int,
    kv_heads: int,
    device: torch.device,
    measure: Callable[[SparsePattern], torch.Tensor] | None = None,
) -> SparsePattern:
    """The kernels' pattern of a planned site, on `device`. measure: gives the bits of its mask, uint8 `[bytes]` on the
    device, for the pattern without one, where the plan has none."""
    bias = None if entry.tail_bias is None else entry.tail_bias[group]
    sizes = {"block_q": block_q, "pool": pool, "expansions": expansions, "kv_heads": kv_heads}
    pattern = build_pattern(layout, entry.orders, None, bias, device=device, **sizes)
    # From bits to bits: the mask itself would take eight times as much.
    bits = sent(entry.packed[group], device) if entry.has_masks else measure(pattern)
    words = words_of_bits(bits, len(entry.orders), pattern.geometry)
    return replace(pattern, kept_words=words)
