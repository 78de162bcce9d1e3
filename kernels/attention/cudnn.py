"""Attention over every key in 16 bits by cuDNN, through torch: on some GPUs twice as fast as torch's other kernels, to
which the host gives precedence."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HEAD_DIMS = (64, 128)
# All of them, in this order: the choice holds for the process, and another thread's attention must find a kernel too.
PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def cudnn_serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch has a cuDNN kernel for such a call; q, k, v `[B, H, L, D]` of as many heads each."""
    fits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] in HEAD_DIMS
    if not fits or torch.version.hip is not None or q.shape[:2] != k.shape[:2]:
        return False
    try:
        return torch.backends.cuda.can_use_cudnn_attention(
            torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        )
    except (AttributeError, TypeError):  # a torch that asks in another way
        return False


def cudnn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """softmax(q k^T * scale) v for q `[B, H, Lq, D]`, k and v `[B, H, L, D]`, fp16 or bf16; scale defaults to
    1/sqrt(D). Returns `[B, H, Lq, D]`. Where `cudnn_serves` says so it is cuDNN that
    computes it; raises TypeError before torch 2.6, which knows no order of kernels."""
    with sdpa_kernel(PRIORITY, set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
