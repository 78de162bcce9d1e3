"""The one door to the kernels: chooses Triton or the reference, and says why it declines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ...kernels.attention.api import sparse_attention as run_kernel
from ...kernels.core.block_mask import words_of_bits
from ...kernels.core.pattern import PRECISIONS, Precision, SparsePattern
from ...kernels.core.support import triton_reason
from ..calibration.observe import geometry_of
from ..plan.orders import order_number, order_tables
from ..plan.plan import SitePlan
from ..plan.token_layout import TokenLayout


def sent(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """x on the device. From ordinary memory the host would wait for all that it launched before."""
    if x.is_cuda or torch.device(device).type != "cuda":
        return x.to(device)
    try:
        return x.pin_memory().to(device, non_blocking=True)
    except RuntimeError:  # the system allows no more pinned memory
        return x.to(device)


def pinned_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor like x on the CPU, pinned where the system allows more of that; a copy to it waits
    otherwise."""
    try:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(x.shape, dtype=x.dtype)


def build_pattern(
    layout: TokenLayout,
    orders: Sequence[str],
    mask: torch.Tensor | None,
    tail_bias: torch.Tensor | None,
    *,
    block_q: int = 64,
    pool: int = 64,
    expansions: int = 0,
    kv_heads: int | None = None,
    device: torch.device | str = "cpu",
) -> SparsePattern:
    """The kernels' pattern from order names per query head, a mask `[H, q_blocks, k_blocks]` and biases `[H]`.

    With fewer key heads than query heads the heads of a group must share an order; raises ValueError if they do not.
    """
    kv_heads = kv_heads or len(orders)
    if len(orders) % kv_heads:
        raise ValueError(f"orders: {len(orders)} query heads do not group over {kv_heads} key heads")
    group = len(orders) // kv_heads
    per_key_head = list(orders[::group])
    if any(orders[i] != per_key_head[i // group] for i in range(len(orders))):
        raise ValueError("orders: query heads that share a key head must share its order")
    index = sent(torch.tensor([order_number(name) for name in per_key_head], dtype=torch.int32), device)
    tables = order_tables(layout.grid, index.device)
    bias = None if tail_bias is None else sent(tail_bias.float(), device)
    geometry = geometry_of(layout, block_q)
    if mask is None:
        return SparsePattern(geometry, tables, index, None, bias, pool, expansions)
    return SparsePattern.from_mask(geometry, tables, index, mask.to(device), bias, pool, expansions)


def pattern_of(
    entry: SitePlan,
    layout: TokenLayout,
    *,
    group: int,
    block_q: int,
    pool: int,
    expansions: int,
    kv_heads: int,
    device: torch.device,
    measure: Callable[[SparsePattern], torch.Tensor] | None = None,
) -> SparsePattern:
    """The kernels' pattern of a planned site, on `device`. measure: gives the bits of its mask, uint8 `[bytes]` on the
    device, for the pattern without one, where the plan has none."""
    bias = None if entry.tail_bias is None else entry.tail_bias[group]
    sizes = {"block_q": block_q, "pool": pool, "expansions": expansions, "kv_heads": kv_heads}
    pattern = build_pattern(layout, entry.orders, None, bias, device=device, **sizes)
    # From bits to bits: the mask itself would take eight times as much.
    bits = sent(entry.packed[group], device) if entry.has_masks else measure(pattern)
    words = words_of_bits(bits, len(entry.orders), pattern.geometry)
    return replace(pattern, kept_words=words)


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
