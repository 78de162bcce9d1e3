"""Other attention kernels that the benchmark compares with, each behind the same call; absent ones say why."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfyui_paro.kernels.problem import SparsePattern
from torch.nn.attention import SDPBackend, sdpa_kernel

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Rival:
    """make(q, k, v, pattern) returns a function that runs once. exact: computes the dense (or the masked) result."""

    make: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, SparsePattern], Run]
    sparse: bool
    exact: bool = True


def _sdpa(backend: SDPBackend):
    def make(q, k, v, pattern):
        def run():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return run

    return make


def _flex(q, k, v, pattern):
    """FlexAttention over the same kept blocks; it has neither context tokens nor a tail, and rows already reordered."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    g = pattern.geometry
    if g.context_tokens:
        raise ValueError("context tokens have no place in its block mask")
    kept = pattern.mask
    # Its blocks are 128 x 128 here; ours are pooled so that it keeps at least what we keep.
    wide = 128 // g.block_q
    rows, columns = -(-kept.shape[1] // wide), -(-kept.shape[2] // 2)
    padded = torch.nn.functional.pad(kept, (0, columns * 2 - kept.shape[2], 0, rows * wide - kept.shape[1]))
    kept = padded.view(kept.shape[0], rows, wide, columns, 2).any(4).any(2)
    counts = kept.sum(2).int()[None]
    indices = kept.int().argsort(dim=2, descending=True, stable=True).int()[None]
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, seq_lengths=(q.shape[2], q.shape[2]))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def _sage(q, k, v, pattern):
    sageattn = importlib.import_module("sageattention").sageattn
    return lambda: sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def _kitchen_int8(q, k, v, pattern):
    attention = importlib.import_module("comfy_kitchen.sage_attention").int8_attention
    return lambda: attention(q, k, v)


def _kitchen_sol(q, k, v, pattern):
    kitchen = importlib.import_module("comfy_kitchen")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: kitchen.sol_attn(q, k, v, topk_ratio=pattern.density).transpose(1, 2)


RIVALS = {
    "sdpa_flash": Rival(_sdpa(SDPBackend.FLASH_ATTENTION), sparse=False),
    "sdpa_cudnn": Rival(_sdpa(SDPBackend.CUDNN_ATTENTION), sparse=False),
    "sageattention": Rival(_sage, sparse=False),
    "kitchen_int8": Rival(_kitchen_int8, sparse=False),
    "flex_attention": Rival(_flex, sparse=True, exact=False),
    "kitchen_sol_attn": Rival(_kitchen_sol, sparse=True, exact=False),
}
