"""Other attention kernels that the benchmark compares with, each behind the same call; absent ones say why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfyui_paro.kernels.core.pattern import SparsePattern
from comfyui_paro.nodes.check.methods import Make, Run, kitchen_int8, kitchen_sol, sage, sdpa
from torch.nn.attention import SDPBackend


@dataclass(frozen=True)
class Rival:
    """make(q, k, v, pattern) returns a function that runs once. exact: computes the dense (or the masked) result."""

    make: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, SparsePattern], Run]
    sparse: bool
    exact: bool = True


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


def _dense(make: Make) -> Rival:
    return Rival(lambda q, k, v, pattern: make(q, k, v), sparse=False)


RIVALS = {
    "sdpa_flash": _dense(sdpa(SDPBackend.FLASH_ATTENTION)),
    "sdpa_cudnn": _dense(sdpa(SDPBackend.CUDNN_ATTENTION)),
    "sageattention": _dense(sage),
    "kitchen_int8": _dense(kitchen_int8),
    "flex_attention": Rival(_flex, sparse=True, exact=False),
    "kitchen_sol_attn": Rival(lambda q, k, v, pattern: kitchen_sol(pattern.density)(q, k, v), sparse=True, exact=False),
}
