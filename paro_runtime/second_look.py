"""Masks measured anew in a run whose plan was made of pure noise.

A run with one dense step makes its plan of what the model does with noise alone: good enough for orders, less so for
masks. So it looks once more in its second sparse step, when there is a picture to see: a few mean queries of every
query block tell which blocks are heaviest, and each head keeps those, as many as before (`docs/method.md`). A run that
goes on with another's picture looks in its first.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import replace
from itertools import pairwise

import torch

from ..kernels.api import block_statistics, row_logsumexp
from ..kernels.problem import Geometry, SparsePattern
from ..kernels.reference import take_rows
from .plan import PER_GROUP, SitePlan
from .selection import masks_of_counts
from .tail import head_groups, of_key_heads, sampled_rows

# Parts of a query block whose mean queries tell what it looks at.
MEANS_PER_BLOCK = 4


class SecondLook:
    """Which sites of one run have been looked at again. Safe to call from several threads.

    at_once: there is a picture from the first sparse step on.
    """

    def __init__(self) -> None:
        self.at_once = False
        self._first: dict[Hashable, int] = {}
        self._looked: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def due(self, key: Hashable, step: int) -> bool:
        """Whether this call is the first of the step in which the site is looked at. Asked in every sparse call."""
        with self._lock:
            first = self._first.setdefault(key, step)
            if (step == first and not self.at_once) or key in self._looked:
                return False
            self._looked[key] = step
            return True

    def ready(self, key: Hashable, step: int) -> bool:
        """What `due` would say now."""
        with self._lock:
            return key not in self._looked and self._first.get(key, step) != step

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


def with_mean_queries(q: torch.Tensor, geometry: Geometry, tables: torch.Tensor, parts: int) -> torch.Tensor:
    """A copy of q `[B, H, L, D]` in which the rows of `sampled_rows`, so many of each query block, are the mean queries
    of the block's parts, which follow each other in the head's order; tables int `[H, N]`. A last block of fewer rows
    than parts stays as it is."""
    g = geometry
    index = tables.long() + g.prefix
    ordered = take_rows(q, index)
    whole = g.grid_tokens // g.block_q * g.block_q
    rest = g.grid_tokens - whole
    means = [ordered[:, :, :whole].unflatten(2, (-1, g.block_q // parts)).mean(3, dtype=torch.float32)]
    if rest >= parts:
        ends = [whole + part * rest // parts for part in range(parts + 1)]
        means += [ordered[:, :, a:b].mean(2, keepdim=True, dtype=torch.float32) for a, b in pairwise(ends)]
    means = torch.cat(means, 2).to(q.dtype)
    places = sampled_rows(g, q.device, parts).flatten()[: means.shape[2]]
    where = index[None, :, places, None].expand(means.shape)
    return q.scatter(2, where, means)


def mean_query_masses(
    q: torch.Tensor,
    k: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of MEANS_PER_BLOCK mean queries of each query block in each block of keys: float32
    `[Hq, q_blocks, k_blocks]`, mean over the batch.

    Arguments as in `observe`; tables int `[Hq, N]`; of key_bias only what keys outside the grid have is in the sums, as
    in all block statistics. What a block of queries looks at shows in few of its means; of single rows it takes more.
    Costs MEANS_PER_BLOCK / block_q of a dense attention.
    """
    g, heads = geometry, q.shape[1]
    group = heads // k.shape[1]
    places = sampled_rows(g, q.device, MEANS_PER_BLOCK).flatten()
    rest = {"scale": scale, "backend": backend}
    found = []
    copies = 2 * q.shape[0] * g.length * q.shape[3] * q.element_size()
    for some in head_groups(heads, group, copies):
        keys, its = k[:, of_key_heads(some, group)], tables[some]
        queries = with_mean_queries(q[:, some], g, its, MEANS_PER_BLOCK)
        tokens = its.long()[:, places] + g.prefix
        lse = row_logsumexp(take_rows(queries, tokens), keys, key_bias=key_bias, **rest)
        lse = torch.zeros(queries.shape[:3], device=q.device).scatter_(2, tokens.expand_as(lse), lse)
        looks = {"rows_per_block": MEANS_PER_BLOCK, **rest}
        found.append(block_statistics(queries, keys, lse, g, its, **looks).mass)
    return torch.cat(found)


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
) -> SitePlan:
    """A site's entry with masks from this call for this group of steps and those behind it: as many blocks of each
    head as before; mass_kept stays what calibration found. pattern: the entry's own in this group; otherwise as
    `sparse_attention`."""
    rest = {"scale": scale, "key_bias": key_bias, "backend": backend}
    masses = mean_query_masses(q, k, pattern.geometry, pattern.tables_of_heads(q.shape[1]), **rest)
    counts = (entry.density[group:] * masses[0].numel()).round().long()
    parts = [replace(entry, **{name: _group(entry, name, before) for name in PER_GROUP}) for before in range(group)]
    for later, mask in enumerate(masks_of_counts(masses, counts.to(masses.device)), group):
        bias, kept = (_group(entry, name, later)[0] for name in ("tail_bias", "mass_kept"))
        parts.append(SitePlan.create(entry.orders, mask, bias, kept))
    return replace(SitePlan.joined(parts), falloff=entry.falloff, rotate=entry.rotate)


def _group(entry: SitePlan, name: str, group: int) -> torch.Tensor:
    return getattr(entry, name)[group : group + 1]
