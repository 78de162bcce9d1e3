"""Sparse attention of orders by name and a mask, as tests state a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfyui_paro.kernels.attention.api import sparse_attention as run_kernel
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.kernels.core.precision import PRECISIONS, Precision
from comfyui_paro.paro_runtime.attention.patterns import build_pattern


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: TokenLayout,
    orders: Sequence[str],
    mask: torch.Tensor | None,
    tail_bias: torch.Tensor | None = None,
    precision: str | Precision = "int8",
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    block_q: int = 64,
    pool: int = 64,
    expansions: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Block-sparse attention in each head's order.

    q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]`, any strides, fp16, bf16 or fp32; L = prefix + F*H*W + suffix. orders:
    a name per query head. mask: bool `[Hq, q_blocks, k_blocks]` over the reordered grid, None keeps everything.
    tail_bias float `[Hq]` adds the pooled tail, with so many `expansions` (`kernels/pooling/reference.py`); without it
    the softmax is over kept blocks only. key_bias: additive `[B, L]`. Returns `[B, Hq, L, D]` in q's dtype. Raises
    ValueError with one line for a call that does not fit.
    """
    sizes = {"block_q": block_q, "pool": pool, "expansions": expansions, "kv_heads": k.shape[1]}
    pattern = build_pattern(layout, orders, mask, tail_bias, device=q.device, **sizes)
    chosen = PRECISIONS[precision] if isinstance(precision, str) else precision
    return run_kernel(q, k, v, pattern, chosen, scale=scale, key_bias=key_bias, backend=backend)
