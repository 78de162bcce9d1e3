"""The kernels' front door: checks a call, then runs Triton or the PyTorch reference."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from ..core.pattern import Geometry, Precision, SparsePattern, problem_with
from ..core.support import triton_reason
from ..statistics.reference import (
    BlockStatistics,
    block_statistics_reference,
    query_sums_reference,
    row_logsumexp_reference,
)
from ..tail_error.reference import BlockCosts, RowMoments, block_costs_reference, row_moments_reference
from .reference import sparse_attention_reference

BACKENDS = ("auto", "triton", "reference")
STATISTICS_PRECISION = Precision("16", "16")
# Wider heads, which no supported model has, would not fit the shared memory of the smaller GPUs.
TAIL_HEAD_DIM = 128


# A GPU does not change: asked once, not in every call.
_reason_on_gpu = lru_cache(maxsize=64)(triton_reason)


def capability_of_gpu(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for every other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@cache
def _triton():
    """The module that launches; imported when it is first needed."""
    from . import launch

    return launch


def chosen_backend(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision) -> str:
    """`triton` or `reference`. `auto` is Triton on a GPU that it serves; asking for it elsewhere is a ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference" or (backend == "auto" and device.type == "cpu"):
        return "reference"
    why_not = _reason_on_gpu if device.type == "cuda" else triton_reason
    reason = why_not(device, dtype, head_dim, precision)
    if reason and backend == "triton":
        raise ValueError(f"triton: {reason}")
    return "reference" if reason else "triton"


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: SparsePattern,
    precision: Precision,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    nonfinite: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention over the kept blocks of each head's reordered sequence.

    Arguments and result as in `reference.sparse_attention_reference`; backend is `auto`, `triton` or `reference`.
    nonfinite: int32 tensor whose first element becomes 1 if the result holds NaN or infinity, and is left alone
    otherwise: the kernel tells on the way what a pass over the result would find. Align it to 16 bytes (see `call`).
    Raises ValueError with one line for a call that does not fit, ScratchOutOfMemory when memory is short. Under
    torch.compile it is one opaque operator: no graph break, and nothing to recompile from step to step.
    """
    if torch.compiler.is_compiling():
        from .operator import attention_operator

        result = attention_operator(
            q, k, v, pattern.tables, pattern.order_of_head, pattern.kept_words, pattern.tail_bias,
            key_bias, pattern.geometry.prefix, list(pattern.geometry.grid), pattern.geometry.suffix,
            pattern.geometry.block_q, pattern.pool, pattern.expansions, precision.qk, precision.pv,
            precision.hadamard, scale, backend,
        )  # fmt: skip
        _tell_nonfinite(result, nonfinite)
        return result if out is None else out.copy_(result)
    reason = problem_with(q, k, v, pattern) or _problem_with_rest(q, scale, key_bias, out, nonfinite)
    if reason:
        raise ValueError(reason)
    if chosen_backend(backend, q.device, q.dtype, q.shape[3], precision) == "reference":
        result = sparse_attention_reference(q, k, v, pattern, precision, scale=scale, key_bias=key_bias, out=out)
        _tell_nonfinite(result, nonfinite)
        return result
    return _triton().launch_attention(
        q, k, v, pattern, precision, scale=scale, key_bias=key_bias, out=out, nonfinite=nonfinite
    )


def _tell_nonfinite(result: torch.Tensor, nonfinite: torch.Tensor | None) -> None:
    if nonfinite is not None:
        nonfinite[:1] |= ~torch.isfinite(result).all()


def _problem_with_rest(q, scale, key_bias, out, nonfinite) -> str | None:
    if scale is not None and not scale > 0:
        return f"scale: must be positive, got {scale}"
    if key_bias is not None and (tuple(key_bias.shape) != (q.shape[0], q.shape[2]) or key_bias.device != q.device):
        return (
            f"key_bias: expected [{q.shape[0]}, {q.shape[2]}] on {q.device}, "
            f"got {tuple(key_bias.shape)} on {key_bias.device}"
        )
    if nonfinite is not None and (nonfinite.dtype != torch.int32 or nonfinite.dim() != 1):
        return f"nonfinite: expected int32 [n], got {nonfinite.dtype} {list(nonfinite.shape)}"
    if nonfinite is not None and nonfinite.device != q.device:
        return f"nonfinite: on {nonfinite.device}, q is on {q.device}"
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or out.device != q.device):
        return (
            f"out: expected {q.dtype} {tuple(q.shape)} on {q.device}, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )
    return None


def row_logsumexp(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """See `statistics_reference.row_logsumexp_reference`."""
    if chosen_backend(backend, q.device, q.dtype, q.shape[3], STATISTICS_PRECISION) == "reference":
        return row_logsumexp_reference(q, k, scale=scale, key_bias=key_bias)
    from ..statistics.triton_statistics import launch_row_logsumexp

    return launch_row_logsumexp(q, k, scale=scale, key_bias=key_bias)


def block_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    geometry: Geometry,
    rows: torch.Tensor,
    *,
    q_blocks: torch.Tensor | None = None,
    scale: float | None = None,
    epsilon: float | None = None,
    rows_per_block: int | None = None,
    backend: str = "auto",
) -> BlockStatistics:
    """See `statistics_reference.block_statistics_reference`."""
    if chosen_backend(backend, q.device, q.dtype, q.shape[3], STATISTICS_PRECISION) == "reference":
        run = block_statistics_reference
    else:
        from ..statistics.triton_statistics import launch_block_statistics as run
    rest = {"q_blocks": q_blocks, "scale": scale, "epsilon": epsilon, "rows_per_block": rows_per_block}
    return run(q, k, lse, geometry, rows, **rest)


def query_sums(
    queries: torch.Tensor,
    k: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    per_block: int,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """See `statistics_reference.query_sums_reference`."""
    if chosen_backend(backend, k.device, k.dtype, k.shape[3], STATISTICS_PRECISION) == "reference":
        run = query_sums_reference
    else:
        from ..statistics.triton_query_sums import launch_query_sums as run
    return run(queries, k, geometry, tables, per_block, scale=scale, key_bias=key_bias)


def _tail_backend(backend: str, q: torch.Tensor) -> str:
    chosen = chosen_backend(backend, q.device, q.dtype, q.shape[3], STATISTICS_PRECISION)
    return "reference" if q.shape[3] > TAIL_HEAD_DIM else chosen


def block_costs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    positions: torch.Tensor,
    *,
    pool: int,
    expanded: bool = False,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> BlockCosts:
    """See `tail_reference.block_costs_reference`; heads wider than TAIL_HEAD_DIM always go there."""
    if _tail_backend(backend, q) == "reference":
        run = block_costs_reference
    else:
        from ..tail_error.triton_block_costs import launch_block_costs as run
    rest = {"pool": pool, "expanded": expanded, "scale": scale, "key_bias": key_bias}
    return run(q, k, v, geometry, tables, positions, **rest)


def row_moments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    positions: torch.Tensor,
    levels: torch.Tensor,
    masks: int,
    *,
    pool: int,
    expansions: int = 0,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> RowMoments:
    """See `tail_reference.row_moments_reference`; heads wider than TAIL_HEAD_DIM always go there."""
    if _tail_backend(backend, q) == "reference":
        run = row_moments_reference
    else:
        from ..tail_error.triton_row_errors import launch_row_moments as run
    return run(
        q,
        k,
        v,
        geometry,
        tables,
        positions,
        levels,
        masks,
        pool=pool,
        expansions=expansions,
        scale=scale,
        key_bias=key_bias,
    )
