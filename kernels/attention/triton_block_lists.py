"""Writes the lists of kept blocks. Import only where a launch is wanted: this module needs Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.layout import Geometry
from ..core.settled import settle
from .block_list_layout import LIST_PADDING, context_blocks

# Blocks that a program looks at together. One warp: places are found by shuffles alone, without a barrier.
COLUMNS = 256
WARPS = 1


@triton.jit(
    do_not_specialize=["q_blocks", "k_blocks", "full_grid", "full_context", "all_blocks", "row_length"]
)  # fmt: skip
def list_blocks(
    kept_words, blocks, q_blocks, k_blocks, full_grid, full_context, all_blocks, row_length,
    COLUMNS: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """One row of one head: what `BlockList.blocks` says, and PADDING zeros. Grid: (q_blocks + 1, heads).

    full_grid and full_context: blocks of the grid and of the context that are not ragged; all_blocks: of both.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    kept_words += (head * q_blocks + tl.minimum(row, q_blocks - 1)).to(tl.int64) * ((k_blocks + 63) // 64 + 1)
    blocks += (head * (q_blocks + 1) + row).to(tl.int64) * row_length
    full = full_grid + full_context
    count = 0
    for first in range(0, all_blocks, COLUMNS):
        # Candidates in the order of the list: the full blocks of the grid, those of the context, then the ragged ones.
        place = first + tl.arange(0, COLUMNS)
        block = tl.where(place < full_grid, place, place - full_grid + k_blocks)
        is_ragged_grid = (place == full) & (full_grid < k_blocks)
        block = tl.where(place < full, block, tl.where(is_ragged_grid, k_blocks - 1, k_blocks + full_context))
        word = tl.load(kept_words + block // 64, block < k_blocks, -1)
        kept = ((word >> (block % 64).to(tl.int64)) & 1).to(tl.int32)
        kept = tl.where(place < all_blocks, tl.where(row == q_blocks, 1, kept), 0)
        tl.store(blocks + count + tl.cumsum(kept, 0) - kept, block.to(tl.int16), kept != 0)
        count += tl.sum(kept, 0)
    tl.store(blocks + count + tl.arange(0, PADDING), tl.zeros([PADDING], tl.int16))


def write_lists(kept_words: torch.Tensor, geometry: Geometry, blocks: torch.Tensor) -> None:
    """Fill `blocks`, `block_list.list_shape` of the heads that the words `[H, q_blocks, row_words]` are of."""
    g = geometry
    list_blocks[(g.q_blocks + 1, kept_words.shape[0])](
        kept_words, blocks, g.q_blocks, g.k_blocks, g.grid_tokens // g.block_k, g.context_tokens // g.block_k,
        g.k_blocks + context_blocks(g.context_tokens, g.block_k), blocks.shape[2],
        COLUMNS=COLUMNS, PADDING=LIST_PADDING, num_warps=WARPS,
    )  # fmt: skip


settle(globals())
