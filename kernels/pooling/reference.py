"""Pooled keys and values that stand for dropped blocks, expanded around the queries that look at them; plain PyTorch.

For a query q the keys of a pool together weigh sum_n exp(s q.k_n). Near a query m, with w the softmax of s m.k_n over
the pool, that is to first order exp(s q.k + b) with

    k = sum_n w_n k_n,   b = log sum_n exp(s m.k_n) - s m.k,   and their values come to   v = sum_n w_n v_n:

exact at q = m, where a plain mean (m = 0: w even, b the logarithm of the count) is exact for no query that occurs. A
head has one m for each stretch of its query blocks, their mean query: blocks that follow each other in the head's order
look at similar places. A kernel reads one set of pools for each row of blocks, so a better set costs it nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch

from ..core.layout import Geometry

# Rows that a mean query is taken over, at most: evenly spread over the stretch, or all of it.
MEAN_ROWS = 128


@dataclass(frozen=True)
class Pools:
    """keys and values `[B, H, stretches, pools, D]`, bias `[B, H, stretches, pools]` in natural logarithms."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor

    def with_keys(self, keys: torch.Tensor, means: torch.Tensor, scale: float) -> Pools:
        """The same with keys that are nearly these: the bias makes up for the difference at the mean queries."""
        return replace(self, keys=keys, bias=self.bias + _products(means, self.keys - keys) * scale)

    def logits(self, rows: torch.Tensor, stretch: torch.Tensor, scale: float) -> torch.Tensor:
        """Logits `[B, H, n, pools]` of rows `[B, H, n, D]`, of which each looks at the pools of its stretch `[n]`."""
        parts = [rows[:, :, its] @ self.keys[:, :, s].mT * scale + self.bias[:, :, s, None] for s, its in runs(stretch)]
        return torch.cat(parts, 2)

    def weighted(self, weights: torch.Tensor, stretch: torch.Tensor) -> torch.Tensor:
        """Sums of values `[B, H, n, D]` for weights as `logits` has them."""
        return torch.cat([weights[:, :, its] @ self.values[:, :, s] for s, its in runs(stretch)], 2)


def _products(means: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Of each mean query with its own pools, `[B, H, stretches, pools]`."""
    return torch.einsum("bhsd,bhspd->bhsp", means, keys)


def stretches_of(g: Geometry, expansions: int) -> int:
    """Sets of pools that a head has: at most one for each query block; one with plain means (expansions 0)."""
    return max(1, min(expansions, g.q_blocks))


def stretch_of_rows(g: Geometry, stretches: int, positions: torch.Tensor) -> torch.Tensor:
    """The stretch in which each position `[n]` of a head's order lies, int64 `[n]`."""
    return positions // g.block_q * stretches // g.q_blocks


def runs(stretch: torch.Tensor) -> list[tuple[int, slice]]:
    """Rows that follow each other and are of one stretch, for stretches `[n]`: waits for the device once."""
    values, counts = stretch.cpu().unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [(s, slice(end - count, end)) for s, count, end in zip(values.tolist(), counts.tolist(), ends, strict=True)]


def stretch_bounds(g: Geometry, stretches: int) -> list[tuple[int, int]]:
    """First position of each stretch and the one behind its last."""
    starts = [-(-i * g.q_blocks // stretches) * g.block_q for i in range(stretches)] + [g.grid_tokens]
    return list(pairwise(starts))


def mean_queries(q: torch.Tensor, g: Geometry, expansions: int, table: torch.Tensor | None = None) -> torch.Tensor:
    """Mean query of each stretch, `[..., stretches, D]`, zero with plain means.

    q `[..., N, D]` in the head's order, or in another, of which table int64 `[N]` has the row at each place.
    """
    if not expansions:
        return torch.zeros_like(q[..., :1, :])
    rows, shares = _rows_of_means(g, stretches_of(g, expansions), q.device)
    its = rows.flatten() if table is None else table[rows.flatten()]
    # As a product: a sum over rows takes ten times as long on a CPU.
    return (shares.to(q.dtype)[:, None] @ q.index_select(-2, its).unflatten(-2, rows.shape))[..., 0, :]


@lru_cache(maxsize=16)
def _rows_of_means(g: Geometry, stretches: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions int64 `[stretches, rows]` that a mean query is of, and their shares float64, 0 behind the last."""
    bounds = stretch_bounds(g, stretches)
    most = min(MEAN_ROWS, max(end - start for start, end in bounds))
    rows = torch.zeros(stretches, most, dtype=torch.int64)
    shares = torch.zeros(stretches, most, dtype=torch.float64)
    for i, (start, end) in enumerate(bounds):
        count = min(end - start, MEAN_ROWS)
        rows[i, :count] = start + (2 * torch.arange(count) + 1) * (end - start) // (2 * count)
        shares[i, :count] = 1 / count
    return rows.to(device), shares.to(device)


def expanded_pools(
    means: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool: int,
    *,
    scale: float,
    key_bias: torch.Tensor | None = None,
) -> Pools:
    """Pools of `pool` keys each around the queries `means` `[B, H, stretches, D]`.

    k and v `[B, H, N, D]`, the grid's in the head's order; the last pool has what is there. key_bias `[B, H, N]`,
    additive: what hides a key hides it in its pool; a pool of hidden keys alone weighs nothing, its bias is finite.
    """
    n = k.shape[2]
    missing = -n % pool
    keys, values = (torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, pool)) for x in (k, v))
    scores = torch.einsum("bhsd,bhpnd->bhspn", means * scale, keys)
    if key_bias is not None:
        bias = torch.nn.functional.pad(key_bias.to(k.dtype).clamp_min(-1e30), (0, missing))
        scores = scores + bias.unflatten(2, (-1, pool))[:, :, None]
    there = torch.nn.functional.pad(torch.ones(n, dtype=torch.bool, device=k.device), (0, missing)).view(-1, pool)
    scores = scores.masked_fill(~there, -torch.inf)
    total = scores.logsumexp(4)
    weights = scores.softmax(4)
    pooled_keys = torch.einsum("bhspn,bhpnd->bhspd", weights, keys)
    pooled_values = torch.einsum("bhspn,bhpnd->bhspd", weights, values)
    return Pools(pooled_keys, pooled_values, total - _products(means, pooled_keys) * scale)
