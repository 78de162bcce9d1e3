"""From the kept blocks in bits to the lists that the attention kernel walks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.block_mask import count_bits, row_words
from ..core.layout import Geometry
from ..core.pattern import SparsePattern

# The kernel's carried next indices read this far past the end of a row.
LIST_PADDING = 4
# Lists of one pattern up to this size are kept with it, larger ones made for each call, in its scratch memory: 40 heads
# of 14,000 tokens in blocks of 128 queries have as many. Sixty sites keep 120 MiB at most, and a call with more takes a
# millisecond, which hides a launch that writes a few megabytes.
LARGEST_KEPT_LIST = 2 << 20


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


def context_blocks(tokens: int, block: int) -> int:
    """Blocks of the context part."""
    return -(-tokens // block)


def list_shape(geometry: Geometry, heads: int) -> tuple[int, int, int]:
    """Of `BlockList.blocks`. A row has room for every block and begins at 16 bytes, whatever heads are taken."""
    row = geometry.k_blocks + context_blocks(geometry.context_tokens, geometry.block_k) + LIST_PADDING
    return heads, geometry.q_blocks + 1, -(-row // 8) * 8


def made_for_each_call(geometry: Geometry, heads: int) -> bool:
    """Whether a pattern of so many query heads has lists too large to be kept."""
    rows = list_shape(geometry, heads)
    return 2 * rows[0] * rows[1] * rows[2] > LARGEST_KEPT_LIST


def held_bytes(geometry: Geometry, heads: int) -> int:
    """What a pattern's words and lists hold of the device's memory between calls."""
    g, (_, rows, row_length) = geometry, list_shape(geometry, heads)
    words = 8 * g.q_blocks * row_words(g.k_blocks)
    rest = 4 * (1 + g.q_blocks + context_blocks(g.context_tokens, g.block_q) + 3 * rows)
    kept = 0 if made_for_each_call(g, heads) else 2 * rows * row_length
    return heads * (words + rest + kept)


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
