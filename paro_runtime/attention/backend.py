"""The one door to the kernels: chooses Triton or the reference, and says why it declines."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.attention.api import sparse_attention as run_kernel
from ...kernels.core.layout import TokenLayout
from ...kernels.core.precision import PRECISIONS, Precision
from ...kernels.core.support import triton_reason
from .patterns import build_pattern


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
    tail_bias float `[Hq]` adds the pooled tail, with so many `expansions` (`kernels.pools`); without it the softmax is
    over kept blocks only. key_bias: additive
    `[B, L]`. Returns `[B, Hq, L, D]` in q's dtype. Raises ValueError with one line for a call that does not fit.
    """
    sizes = {"block_q": block_q, "pool": pool, "expansions": expansions, "kv_heads": k.shape[1]}
    pattern = build_pattern(layout, orders, mask, tail_bias, device=q.device, **sizes)
    chosen = PRECISIONS[precision] if isinstance(precision, str) else precision
    return run_kernel(q, k, v, pattern, chosen, scale=scale, key_bias=key_bias, backend=backend)


def resolve_precision(name: str, recipe_precision: str, device: torch.device) -> str:
    """The precision to use: the user's, else the recipe's, else what suits the device.

    Hopper and data-centre Blackwell multiply FP8 as fast as INT8, and FP8 follows peaked attention better. GeForce Ada
    and Blackwell halve FP8 with 32-bit sums, and Ampere has none: INT8 there. Elsewhere the reference runs, and 16-bit
    values cost it nothing.
    """
    name = recipe_precision if name == "auto" else name
    if name != "auto":
        return name
    if device.type != "cuda" or torch.version.hip is not None:
        return "int8"
    return "fp8" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "int8_pv8"


def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision
) -> tuple[str, str | None]:
    """The backend to use and, if there is none, why.

    `auto`: Triton on a GPU that can, the reference on the CPU. On a GPU that cannot (no Triton, too old, another maker)
    the reference would be many times slower than the host's attention, so nothing is run there unless it is asked for.
    """
    if name == "reference" or (name == "auto" and device.type == "cpu"):
        return "reference", None
    return "triton", triton_reason(device, dtype, head_dim, precision)
