"""Sparse attention: checks a call, then runs Triton or the PyTorch reference; for torch.compile one opaque operator."""

from __future__ import annotations

import re
from functools import cache

import torch

from ..core.dispatch import chosen_backend
from ..core.layout import Geometry
from ..core.pattern import SparsePattern, empty_output, problem_with
from ..core.precision import Precision
from .reference import sparse_attention_reference


@cache
def _triton():
    """The module that launches; imported when it is first needed."""
    from . import launch

    return launch


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
    otherwise: the kernel tells on the way what a pass over the result would find. Align it to 16 bytes (see
    `launch_plan.parts_of`). Raises ValueError with one line for a call that does not fit, ScratchOutOfMemory when
    memory is short. Under torch.compile it is one opaque operator: no graph break, and nothing to recompile from step
    to step.
    """
    if torch.compiler.is_compiling():
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


# The pack may be imported under more than one name in a process (the host's and the tests'); operators are global. The
# host's name is the folder's whole path, and torch takes no name with letters beyond ASCII.
NAMESPACE = re.sub(r"\W", "_", f"paro_{__name__.rpartition('.')[0]}", flags=re.ASCII)


# An operator of torch takes tensors and plain values only, so the pattern and the precision come in pieces.
@torch.library.custom_op(f"{NAMESPACE}::sparse_attention", mutates_args=())
def attention_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: torch.Tensor,
    order_of_head: torch.Tensor,
    kept_words: torch.Tensor | None,
    tail_bias: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    prefix: int,
    grid: list[int],
    suffix: int,
    block_q: int,
    pool: int,
    expansions: int,
    qk: str,
    pv: str,
    hadamard: bool,
    scale: float | None,
    backend: str,
) -> torch.Tensor:
    """`sparse_attention` with the pattern and the precision in pieces; result as `empty_output`."""
    frames, height, width = grid
    geometry = Geometry(prefix, (frames, height, width), suffix, block_q)
    pattern = SparsePattern(geometry, tables, order_of_head, kept_words, tail_bias, pool, expansions)
    precision = Precision(qk, pv, hadamard)
    return sparse_attention(q, k, v, pattern, precision, scale=scale, key_bias=key_bias, backend=backend)


@attention_operator.register_fake
def _(q, *rest):
    return empty_output(q)
