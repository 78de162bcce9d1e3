"""From the kept blocks in bits to the lists that the attention kernel walks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.block_mask import count_bits
from ..core.pattern import SparsePattern
from .block_list_layout import context_blocks, list_shape, made_for_each_call


@dataclass(frozen=True)
class BlockList:
    """Key blocks per (head, row of query blocks); row q_blocks of each head stands for all context rows.

    head_order int32 `[H]`, row_order int32 `[H, q_blocks + context q blocks]`: the longest first.
    start, full, count int32 `[H, q_blocks + 1]`: where a row begins, its full blocks, all its blocks.
    blocks int16 `[H, q_blocks + 1, row_length]`: in each row the full blocks rising, context included, then the ragged
    ones; None where they are made for each call.
    """

    head_order: torch.Tensor
    row_order: torch.Tensor
    start: torch.Tensor
    full: torch.Tensor
    count: torch.Tensor
    blocks: torch.Tensor | None

    _of_heads: dict[tuple[int, int], BlockList] = field(default_factory=dict, compare=False, repr=False)

    def of_heads(self, heads: slice) -> BlockList:
        """The same for some of the heads; made once."""
        key = (heads.start, heads.stop)
        if key not in self._of_heads:
            count = self.count[heads]
            self._of_heads[key] = BlockList(
                _longest_heads_first(count),
                self.row_order[heads],
                self.start[: count.shape[0]],
                self.full[heads],
                count,
                None if self.blocks is None else self.blocks[heads],
            )
        return self._of_heads[key]


# By words, not by pattern: a compiled graph carries that tensor alone from call to call.
_lists = WeakTensorKeyDictionary()


def block_list(pattern: SparsePattern) -> BlockList:
    """The pattern's lists, made on first use and kept as long as its words live. Needs Triton."""
    words = pattern.kept_words
    # Tensors made under inference mode, as the host runs everything, count no changes in place; nobody makes any there.
    key = (pattern.geometry, None if words.is_inference() else words._version)
    found = _lists.get(words)
    if found is None or found[0] != key:
        found = _lists[words] = (key, _build(pattern))
    return found[1]


def _longest_heads_first(count: torch.Tensor) -> torch.Tensor:
    return count.sum(1).argsort(dim=0, descending=True, stable=True).int()


@lru_cache(maxsize=4)
def _row_starts(heads: int, rows: int, row_length: int, device: torch.device) -> torch.Tensor:
    """int32 `[heads, rows]`; every site of a run asks for the same."""
    return torch.arange(heads * rows, dtype=torch.int32, device=device).view(heads, rows) * row_length


def _build(pattern: SparsePattern) -> BlockList:
    g, words = pattern.geometry, pattern.kept_words
    heads = words.shape[0]
    shape = _, rows, row_length = list_shape(g, heads)
    grid_ragged = int(g.grid_tokens % g.block_k > 0)
    context_full, context_ragged = divmod(g.context_tokens, g.block_k)
    context = context_full + bool(context_ragged)
    if g.k_blocks + context >= 1 << 15:
        raise ValueError(f"length: {g.length} tokens are more than the kernel's 16-bit block lists can name")
    last = g.k_blocks - 1
    ragged = (words[:, :, last // 64] >> (last % 64) & 1) * grid_ragged
    count = count_bits(words).sum(2)

    def with_context_row(of_grid: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(of_grid, (0, 1), value=value).int()

    row_order = torch.nn.functional.pad(
        count + context, (0, context_blocks(g.context_tokens, g.block_q)), value=g.k_blocks + context
    ).argsort(dim=1, descending=True, stable=True)
    start = _row_starts(heads, rows, row_length, words.device)
    blocks = None
    if not made_for_each_call(g, heads):
        from .triton_block_lists import write_lists

        blocks = torch.empty(shape, dtype=torch.int16, device=words.device)
        write_lists(words, g, blocks)
    return BlockList(
        _longest_heads_first(count),
        row_order.int(),
        start,
        with_context_row(count - ragged + context_full, g.k_blocks - grid_ragged + context_full),
        with_context_row(count + context, g.k_blocks + context),
        blocks,
    )
