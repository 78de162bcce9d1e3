"""How long one attention call takes, and how exact it is, by several methods on the same random inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...kernels.attention.api import sparse_attention as run_kernel
from ...kernels.core.layout import TokenLayout
from ...kernels.core.pattern import MOST_EXPANSIONS, SparsePattern
from ...kernels.core.precision import PRECISIONS
from ...kernels.core.scratch import ScratchOutOfMemory, release_scratch
from ...paro_runtime.attention.dense import dense_pattern
from ...paro_runtime.attention.patterns import build_pattern
from ...paro_runtime.plan.options import MaskOptions, query_block
from ...paro_runtime.plan.orders import AXIS_ORDERS
from ...paro_runtime.report.sentences import clipped
from .methods import Make, Run, Unavailable

log = logging.getLogger("paro")
# Of one call: floating-point operations that the slowest GPU worth measuring does within a second. A longer call is
# measured with fewer heads, which take as long each where they fill the GPU.
MOST_WORK = 2e13
# q, k, v, a result, and what the method itself takes beside them, in tensors like q.
TENSORS_OF_A_CALL = 12
# Of the memory that is free.
SHARE_OF_MEMORY = 0.6
# A batch of runs is timed as a whole, for so long or so many; the median of the batches counts.
BATCH_MS, MOST_RUNS, BATCHES = 60.0, 20, 3
# Once all methods together have taken so many seconds, the others are left out.
MOST_SECONDS = 30.0
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Size:
    """One self-attention call: its tokens, query heads (as many key heads), channels of a head, and type."""

    layout: TokenLayout
    heads: int
    head_dim: int
    dtype: torch.dtype

    def heads_measured(self, free: float | None) -> int:
        """Heads to measure with, 0 where not one fits into `free` bytes (None: not known)."""
        length = self.layout.length
        heads = min(self.heads, max(1, int(MOST_WORK // (4 * length**2 * self.head_dim))))
        if free is None:
            return heads
        one_head = TENSORS_OF_A_CALL * length * self.head_dim * self.dtype.itemsize
        return min(heads, int(SHARE_OF_MEMORY * free // one_head))

    def as_dict(self) -> dict:
        """JSON-ready."""
        return {
            "tokens": self.layout.length,
            "layout": self.layout.describe(),
            "heads": self.heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class Method:
    """An attention to measure. kind: `host`, `paro` or `other`; density: share of the blocks that it computes."""

    name: str
    kind: str
    make: Make
    density: float = 1.0


@dataclass(frozen=True)
class Row:
    """What was measured of one method. ms: of one call with all heads of the model; error: relative L2 against exact
    dense attention of the same inputs, on a sample of the rows; heads: measured ones; reason: why there is no time."""

    name: str
    kind: str
    density: float
    ms: float | None = None
    error: float | None = None
    heads: int = 0
    reason: str = ""


def paro_methods(size: Size, precision: str, options: MaskOptions, density: float, backend: str) -> list[Method]:
    """PARO's own two: every block kept, and at a density with a random mask; the pre-pass is in both."""
    chosen = PRECISIONS[precision]

    def run(q, k, v, pattern: SparsePattern) -> Run:
        return lambda: run_kernel(q, k, v, pattern, chosen, backend=backend)

    def dense(q, k, v) -> Run:
        return run(q, k, v, dense_pattern(size.layout, q.shape[1], q.shape[1], q.device))

    def sparse(q, k, v) -> Run:
        return run(q, k, v, random_pattern(size.layout, q.shape[1], density, options.pool, q.device))

    return [
        Method(f"PARO with every block ({precision})", "paro", dense),
        Method(f"PARO with {100 * density:.0f} % of blocks ({precision})", "paro", sparse, density),
    ]


def random_pattern(
    layout: TokenLayout, heads: int, density: float, pool: int | None, device: torch.device
) -> SparsePattern:
    """As many blocks in every row as the density says, at random places; heads in all axis orders; with the tail if
    there is a `pool` for it."""
    block_q = query_block(layout.grid_tokens)
    rows, columns = -(-layout.grid_tokens // block_q), -(-layout.grid_tokens // 64)
    generator = torch.Generator(device).manual_seed(0)
    score = torch.rand(heads, rows, columns, generator=generator, device=device)
    best = score.topk(max(1, round(density * columns)), 2).indices
    mask = torch.zeros(heads, rows, columns, dtype=torch.bool, device=device).scatter_(2, best, True)
    orders = [AXIS_ORDERS[head % len(AXIS_ORDERS)] for head in range(heads)]
    bias = None if pool is None else torch.zeros(heads)
    sizes = {"block_q": block_q, "pool": pool or 64, "expansions": 0 if pool is None else MOST_EXPANSIONS}
    return build_pattern(layout, orders, mask, bias, device=device, **sizes)


def measure(
    methods: list[Method], size: Size, device: torch.device, free: float | None, between: Callable[[str], None]
) -> tuple[Row, ...]:
    """A row for each method, measured one after another. free: bytes of memory that may be used, None where that is not
    known. between: called with the method's name before every run of it; may raise, to stop."""
    heads = size.heads_measured(free)
    if heads < 1:
        return tuple(_not_measured(each, "there is not enough free memory for one head") for each in methods)
    try:
        q, k, v = inputs(size, heads, device)
        exact = [(head, *exact_rows(q, k, v, head)) for head in sorted({0, heads - 1})]
        began, rows = time.perf_counter(), []
        for method in methods:
            seconds = time.perf_counter() - began
            if seconds > MOST_SECONDS:
                rows.append(_not_measured(method, f"left out, the others took {seconds:.0f} s"))
                continue
            rows.append(_measured(method, size, (q, k, v), exact, between))
        return tuple(rows)
    finally:
        release_scratch()


def inputs(size: Size, heads: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """q, k, v `[1, heads, L, D]`, unit normal, as views of `[1, L, heads * D]`: what most models hand over."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, size.layout.length, heads * size.head_dim)
    drawn = (torch.randn(shape, generator=generator, dtype=size.dtype, device=device) for _ in range(3))
    return tuple(x.unflatten(2, (heads, size.head_dim)).transpose(1, 2) for x in drawn)


def exact_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows, int64 `[n]`, and exact attention of them in one head, float64 `[n, D]`, both on the CPU."""
    rows = torch.linspace(0, q.shape[2] - 1, min(SAMPLED_ROWS, q.shape[2])).long()
    some, keys, values = (x.cpu().double() for x in (q[0, head, rows.to(q.device)], k[0, head], v[0, head]))
    return rows, (some @ keys.T * q.shape[3] ** -0.5).softmax(1) @ values


def _measured(method: Method, size: Size, qkv: tuple, exact: list, between: Callable[[str], None]) -> Row:
    q = qkv[0]
    between(method.name)
    try:
        run = method.make(*qkv)
        out = run()
        if out.shape != q.shape:
            raise Unavailable(f"the result is {list(out.shape)}, expected {list(q.shape)}")
        error = _error(out, exact)
        del out
        ms = _milliseconds(run, q.device, lambda: between(method.name))
    except (torch.OutOfMemoryError, ScratchOutOfMemory):
        if q.is_cuda:
            torch.cuda.empty_cache()
        return _not_measured(method, "there is not enough free memory")
    except Unavailable as reason:
        return _not_measured(method, str(reason))
    except Exception as failure:  # others' kernels fail in ways of their own, and the rest is measured all the same
        log.info("PARO Check: %s could not be measured", method.name, exc_info=failure)
        return _not_measured(method, clipped(f"{type(failure).__name__}: {failure}", 160))
    return Row(method.name, method.kind, method.density, ms * size.heads / q.shape[1], error, q.shape[1])


def _not_measured(method: Method, reason: str) -> Row:
    return Row(method.name, method.kind, method.density, reason=reason)


def _error(out: torch.Tensor, exact: list[tuple[int, torch.Tensor, torch.Tensor]]) -> float:
    found = torch.cat([out[0, head, rows.to(out.device)].cpu().double() for head, rows, _ in exact])
    expected = torch.cat([each for *_, each in exact])
    return ((found - expected).norm() / expected.norm()).item()


def _milliseconds(run: Run, device: torch.device, between: Callable[[], None]) -> float:
    """Median over a few batches of runs, of one run."""
    between()
    once = _batch(run, 1, device)
    runs = max(1, min(MOST_RUNS, int(BATCH_MS / max(once, 1e-3))))
    if once > BATCH_MS * BATCHES:
        return once
    times = []
    for _ in range(BATCHES):
        between()
        times.append(_batch(run, runs, device))
    return sorted(times)[len(times) // 2]


def _batch(run: Run, runs: int, device: torch.device) -> float:
    """Milliseconds of one run, of so many launched one after another."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(runs):
            run()
        return (time.perf_counter() - began) * 1e3 / runs
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        start.record()
        for _ in range(runs):
            run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / runs
