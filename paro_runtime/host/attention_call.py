"""The host's attention calls: every form it uses, brought to `[B, H, L, D]` views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_NO_OPTIONS: Mapping[str, Any] = {}


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call. q `[B, H, Lq, D]`; k, v `[B, Hkv, Lk, D]`: views of what the host passed, of any strides.

    mask     as the host passed it, or None.
    scale    of the scores, or None for 1/sqrt(D).
    heads_apart  whether the caller wants `[B, H, L, D]` back rather than `[B, L, H*D]`.
    exact    a reason why the caller does not want reduced precision, or None.
    options  the call's `transformer_options`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None
    heads_apart: bool = False
    exact: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_caller(self, out: torch.Tensor) -> torch.Tensor:
        """`[B, H, L, D]` -> the layout the caller asked for."""
        return out if self.heads_apart else out.transpose(1, 2).flatten(2)

    def unlike_result(self, out: Any) -> str | None:
        """Why `out` cannot be this call's result `[B, H, L, D]`, or None."""
        shape = (*self.q.shape[:3], self.v.shape[3])
        if not isinstance(out, torch.Tensor):
            return f"the result is {type(out).__name__}, not a tensor"
        if (tuple(out.shape), out.dtype, out.device) != (shape, self.q.dtype, self.q.device):
            return f"the result is {list(out.shape)} {out.dtype} on {out.device}, expected {list(shape)} {self.q.dtype}"
        return None

    def from_caller(self, out: torch.Tensor) -> torch.Tensor:
        """What the host's own function returned -> `[B, H, L, D]`."""
        return out if self.heads_apart else out.unflatten(2, (self.q.shape[1], -1)).transpose(1, 2)


def options_of(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `transformer_options` of a call; the host passes them by keyword only. What is no mapping has none."""
    given = kwargs.get("transformer_options")
    return given if isinstance(given, Mapping) else _NO_OPTIONS


def read_call(*args: Any, **kwargs: Any) -> AttentionCall | None:
    """Bind a call of the host's attention, or None where it has a form this pack does not know."""
    try:
        return _read(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None


def _read(
    q: Any,
    k: Any,
    v: Any,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    low_precision_attention: bool = True,
    **others: Any,
) -> AttentionCall | None:
    q, k, v = (_tensor(t) for t in (q, k, v))
    if not skip_reshape:
        # Stable Diffusion 3 passes v with its heads apart already.
        q, k, v = (t.flatten(2) for t in (q, k, v))
        width = q.shape[-1] // heads
        kv_heads = k.shape[-1] // width if enable_gqa else heads
        q = q.unflatten(2, (heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(2, (kv_heads, -1)).transpose(1, 2) for t in (k, v))
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape or q.shape[1] != heads or q.shape[3] != k.shape[3]:
        return None
    exact = None
    if not low_precision_attention:
        exact = "the model asks for full precision in this call"
    elif attn_precision == torch.float32 and q.dtype != torch.float32:
        exact = "the model asks for float32 attention"
    return AttentionCall(q, k, v, mask, scale, skip_output_reshape, exact, options_of(others))


def _tensor(value: Any) -> torch.Tensor:
    """Look into a tensor container without consuming it: whether PARO takes the call is decided later."""
    return value if isinstance(value, torch.Tensor) else value.peek()


def key_bias(mask: torch.Tensor | None, batch: int, keys: int) -> torch.Tensor | str | None:
    """The additive bias per key, float32 `[B, L]`, that equals the host's mask; None without one, else a reason.

    The host takes `[B, 1, 1, L]`, `[B, 1, L]`, `[1, L]` or `[B, L]` (1 for B where all rows agree), bool with True =
    attend, or added to the scores. A mask that depends on the query or the head has no such form.
    """
    if mask is None:
        return None
    rows = mask.shape[0]
    fits = mask.shape[-1] == keys and rows in (1, batch) and all(n == 1 for n in mask.shape[1:-1])
    if not 2 <= mask.dim() <= 4 or not fits:
        return f"a mask of shape {list(mask.shape)}, which is not one value per key"
    bias = mask.reshape(rows, keys)
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, float("-inf"))
    elif not bias.is_floating_point():
        return f"a mask of type {str(bias.dtype).removeprefix('torch.')}"
    return bias.float().expand(batch, keys)
