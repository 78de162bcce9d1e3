"""The attention as one operator of torch.library, so that torch.compile carries it without looking inside."""

from __future__ import annotations

import re

import torch

from ..core.layout import Geometry
from ..core.pattern import SparsePattern, empty_output
from ..core.precision import Precision

# The pack may be imported under more than one name in a process (the host's and the tests'); operators are global. The
# host's name is the folder's whole path, and torch takes no name with letters beyond ASCII.
NAMESPACE = re.sub(r"\W", "_", f"paro_{__name__.rpartition('.')[0]}", flags=re.ASCII)


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
    """`api.sparse_attention` with the pattern and the precision in pieces; result as `empty_output`."""
    from .api import sparse_attention

    geometry = Geometry(prefix, tuple(grid), suffix, block_q)
    pattern = SparsePattern(geometry, tables, order_of_head, kept_words, tail_bias, pool, expansions)
    precision = Precision(qk, pv, hadamard)
    return sparse_attention(q, k, v, pattern, precision, scale=scale, key_bias=key_bias, backend=backend)


@attention_operator.register_fake
def _(q, *rest):
    return empty_output(q)
