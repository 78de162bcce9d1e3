"""What mask and tail get wrong on average over rows that follow each other, given back to them.

The mean query of 8 to 128 such rows is a row more to compute, with every key and with those kept. In a head that
looks everywhere the difference is what all those rows miss; in a head that looks at one place the mean query looks at
no place in particular and tells nothing. So each head takes the share of its correction that was best on sampled rows,
whose exact output is known (least squares, 0 to 1), and heads that gain little take none and cost nothing.

What is missed hardly changes from step to step: corrections are made in the first step of each group of steps, and
added in the others as they were then, which on the tiny model is worth as much as making them in every step
(`docs/method.md`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..kernels.api import add_corrections, correction_backend, query_corrections
from ..kernels.correction_reference import POOL
from ..kernels.problem import Geometry, SparsePattern
from ..kernels.reference import take_rows
from .attention import pinned_like, sent
from .patterns import cache_bytes
from .refresh import measured_rows, restoring
from .tail import spread_positions

# A head that gets rid of less than this share of its squared error is not worth the time.
LEAST_GAIN = 0.2
# A mean query stands for so many rows on grids of up to so many tokens, on larger ones for a whole query block.
FINE_ROWS = ((2048, 8), (8192, 16))


def rows_per_mean_query(g: Geometry) -> int:
    """Rows that share a mean query.

    On small grids launches take the time and mean queries next to none, and a query block is wide compared with the
    picture: its rows have less in common. On large ones a block is a small part of the picture, and half as many rows
    to a mean query would cost twice the time.
    """
    return next((rows for tokens, rows in FINE_ROWS if g.grid_tokens <= tokens), g.block_q)


@dataclass
class _Fit:
    """Sums per head of one step: squared error, error times correction, squared correction, and the squared output that
    would be exact; float32 `[4, Hq]`."""

    step: int
    sums: torch.Tensor


class _Shares:
    """Share per query head, float32 `[Hq]`, and the heads that have one."""

    def __init__(self, shares: torch.Tensor) -> None:
        self.shares = shares
        self._on_host, self._there, self._heads = shares, None, None
        if shares.is_cuda:
            # Which heads they are decides later launches: nothing waits for it in the step that measures.
            self._on_host = pinned_like(shares).copy_(shares, non_blocking=True)
            self._there = torch.cuda.current_stream(shares.device).record_event()

    def heads(self) -> torch.Tensor:
        """int32 `[n]`, on the CPU; waits until the shares are known."""
        if self._heads is None:
            if self._there is not None:
                self._there.synchronize()
            self._heads = self._on_host.nonzero()[:, 0].int()
        return self._heads


@dataclass
class _Carried:
    """Corrections `[B, n, groups, D]` of the heads `heads` int32 `[n]`, in the dtype of what they are added to: of all
    heads, or of those that have a share of the shares `of`."""

    corrections: torch.Tensor
    heads: torch.Tensor
    of: _Shares | None = None

    def reduced(self, shares: _Shares) -> _Carried:
        """The same of those heads only that have a share. Done once: a head that loses its share later gets nothing of
        it, one that gains one has no correction in it."""
        if self.of is not None:
            return self
        heads = sent(shares.heads(), self.heads.device)
        return _Carried(self.corrections.index_select(1, heads.long()), heads, shares)


def exact_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    *,
    scale: float | None,
    key_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Dense attention of the rows `rows` int64 `[Hq, R]` of each head, `[B, Hq, R, D]`; keys need no order for it."""
    batch, heads, _, dim = q.shape
    group = heads // k.shape[1]
    # The query heads that share a key head stand behind each other: a row does not know of the others.
    queries = take_rows(q, rows).reshape(batch, heads // group, group * rows.shape[1], dim)
    bias = None if key_bias is None else key_bias.to(q.dtype)[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(queries, k, v, attn_mask=bias, scale=scale)
    return out.reshape(batch, heads, rows.shape[1], dim)


class QueryCorrection:
    """Shares of one run by site, corrections by site and call. Safe to call from several threads."""

    def __init__(self) -> None:
        self._fits: dict[Hashable, _Fit] = {}
        self._wrong: dict[tuple[Hashable, int], torch.Tensor] = {}
        self._shares: dict[Hashable, _Shares] = {}
        self._carried: dict[tuple[Hashable, Hashable], _Carried] = {}
        self._lock = threading.Lock()

    @property
    def heads(self) -> tuple[int, int]:
        """Heads that are corrected at present, and heads that were looked at."""
        with self._lock:
            found = list(self._shares.values())
        return sum(one.heads().numel() for one in found), sum(one.shares.numel() for one in found)

    @property
    def error(self) -> tuple[float, float] | None:
        """Relative L2 error of the corrected attention on the rows that were looked at: of all sites and steps in which
        corrections were made together, and of the worst site in one of them. None where nothing was measured."""
        with self._lock:
            found = list(self._wrong.values())
        if not found:
            return None
        wrong, whole = torch.stack([sums.sum(1).cpu() for sums in found]).unbind(1)
        wrong, whole = wrong.clamp_min(0), whole.clamp_min(1e-20)  # rounding may take more than there is
        return float((wrong.sum() / whole.sum()).sqrt()), float((wrong / whole).sqrt().max())

    def suits(self, q: torch.Tensor, pattern: SparsePattern, backend: str) -> bool:
        """Whether a call can be corrected, and by the kernel where the attention is: its reference takes too long."""
        served = correction_backend(backend, q) == backend
        tail = pattern.kept_words is not None and pattern.tail_bias is not None
        return served and tail and pattern.pool == POOL

    def forget(self) -> None:
        """The masks are others now: nothing holds any more."""
        with self._lock:
            for known in self._all():
                known.clear()

    def _all(self) -> tuple[dict, ...]:
        return self._fits, self._shares, self._carried, self._wrong

    def saved(self) -> Callable[[], None]:
        """What puts everything back to how it is now."""
        with self._lock:
            return restoring(self._lock, self._all())

    def apply(
        self,
        key: Hashable,
        call: Hashable,
        step: int,
        due: bool,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        pattern: SparsePattern,
        *,
        scale: float | None,
        key_bias: torch.Tensor | None,
        nonfinite: torch.Tensor | None = None,
        last: bool = False,
        backend: str = "auto",
    ) -> None:
        """Correct `out` `[B, Hq, L, D]` in place. key: the site; call: which of its calls in a step this is, since
        conditionings that the host runs apart miss different things. due: make the corrections and measure the shares,
        as after every change of the masks; else they are those of the last time. last: no later step wants those that
        are made. Otherwise as `sparse_attention`.

        For the shares the calls of one step add up.
        """
        rows = rows_per_mean_query(pattern.geometry)
        rest = {"rows": rows, "scale": scale, "key_bias": key_bias, "backend": backend}
        where = (key, call)
        if due:
            every_head = _every_head(q.shape[1], q.device)
            corrections = query_corrections(q, k, v, pattern, every_head, **rest)
            self._measure(key, step, q, k, v, out, pattern, corrections, scale, key_bias)
        with self._lock:
            its = self._shares.get(key)
            carried = self._carried.get(where)
        if its is None or (not due and (carried is None or carried.corrections.shape[0] != out.shape[0])):
            return
        shares = its.shares.to(out.device)
        if due:
            # Of all heads, since nobody has waited for the shares: what has none may be anything.
            none = (shares == 0)[:, None, None]
            carried = _Carried(corrections.masked_fill(none, 0).to(out.dtype), every_head)
            # Where there is no room for all heads, those that have a share are waited for.
            if not last and not self._carry(where, carried):
                self._carry(where, carried.reduced(its))
        else:
            carried = carried.reduced(its)
            self._carry(where, carried)
            if not carried.heads.numel():
                return
        rest = {"rows": rows, "nonfinite": nonfinite, "backend": backend}
        add_corrections(out, carried.corrections, shares, pattern, carried.heads, **rest)

    def _carry(self, where: tuple[Hashable, Hashable], carried: _Carried) -> bool:
        """Keep corrections for the steps to come, if there is room for them; else those go without."""
        with self._lock:
            self._carried.pop(where, None)
            fits = sum(map(_bytes, self._carried.values())) + _bytes(carried) <= cache_bytes(carried.corrections.device)
            if fits:
                self._carried[where] = carried
            return fits

    def _measure(self, key, step, q, k, v, out, pattern, corrections, scale, key_bias) -> None:
        g, group = pattern.geometry, q.shape[1] // pattern.kv_heads
        positions = spread_positions(g.grid_tokens, measured_rows(g.grid_tokens), q.device)
        rows = pattern.tables[:, positions][pattern.order_of_head.long()].repeat_interleave(group, 0).long() + g.prefix
        exact = exact_rows(q, k, v, rows, scale=scale, key_bias=key_bias).float()
        error = exact - take_rows(out, rows).float()
        correction = corrections[:, :, positions // rows_per_mean_query(g)].float()
        pairs = ((error, error), (error, correction), (correction, correction), (exact, exact))
        sums = torch.stack([(a * b).sum((0, 2, 3)) for a, b in pairs])
        with self._lock:
            before = self._fits.get(key)
            if before is not None and before.step == step:
                sums = sums + before.sums.to(sums.device)
            self._fits[key] = _Fit(step, sums)
        shares = best_shares(sums)
        with self._lock:
            self._shares[key] = _Shares(shares)
            self._wrong[key, step] = torch.stack([sums[0] - gain_of(shares, sums), sums[3]])


@lru_cache(maxsize=8)
def _every_head(heads: int, device: torch.device) -> torch.Tensor:
    return torch.arange(heads, dtype=torch.int32, device=device)


def _bytes(carried: _Carried) -> int:
    return carried.corrections.numel() * carried.corrections.element_size()


def best_shares(sums: torch.Tensor) -> torch.Tensor:
    """Share of the correction that leaves least squared error, 0 to 1, and 0 below LEAST_GAIN; sums as in `_Fit`."""
    error, cross, correction = sums[:3]
    shares = (cross / correction.clamp_min(1e-20)).clamp(0, 1)
    return shares.where(gain_of(shares, sums) > LEAST_GAIN * error, torch.zeros_like(shares))


def gain_of(shares: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Squared error that so much of the correction takes away, `[Hq]`; sums as in `_Fit`."""
    return 2 * shares * sums[1] - shares.square() * sums[2]
