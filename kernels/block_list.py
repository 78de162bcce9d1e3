"""From a block mask to the lists of kept blocks that the attention kernel walks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .problem import SparsePattern

# Bytes of index scratch while one group of heads is compacted.
COMPACTION_BYTES = 1 << 27
# The kernel's carried next indices read this far past the end of the last row.
LIST_PADDING = 4


@dataclass(frozen=True)
class BlockList:
    """Key blocks per (head, row of query blocks); row q_blocks of each head stands for all context rows.

    blocks int16 `[entries]`: in each row the full blocks rising, context included, then the ragged ones.
    start, full, count int32 `[H, q_blocks + 1]`: where a row begins, its full blocks, all its blocks.
    kept_words int64 `[H, q_blocks, words + 1]`: the mask, bit b of word w for key block 64 w + b; one word of padding.
    head_order int32 `[H]`, row_order int32 `[H, q_blocks + context q blocks]`: the longest first.
    """

    blocks: torch.Tensor
    start: torch.Tensor
    full: torch.Tensor
    count: torch.Tensor
    kept_words: torch.Tensor
    head_order: torch.Tensor
    row_order: torch.Tensor

    _of_heads: dict[tuple[int, int], BlockList] = field(default_factory=dict, compare=False, repr=False)

    def of_heads(self, heads: slice) -> BlockList:
        """The same for some of the heads; made once."""
        key = (heads.start, heads.stop)
        if key not in self._of_heads:
            count = self.count[heads]
            self._of_heads[key] = BlockList(
                self.blocks,
                self.start[heads],
                self.full[heads],
                count,
                self.kept_words[heads],
                _longest_heads_first(count),
                self.row_order[heads],
            )
        return self._of_heads[key]


# By mask, not by pattern: a compiled graph carries the mask tensor alone from call to call.
_lists = WeakTensorKeyDictionary()


def block_list(pattern: SparsePattern) -> BlockList:
    """The list of the pattern's mask, made on first use and kept as long as the mask lives."""
    key = (pattern.geometry, pattern.mask._version)
    found = _lists.get(pattern.mask)
    if found is None or found[0] != key:
        found = _lists[pattern.mask] = (key, _build(pattern))
    return found[1]


def context_blocks(tokens: int, block: int) -> int:
    """Blocks of the context part."""
    return -(-tokens // block)


def _longest_heads_first(count: torch.Tensor) -> torch.Tensor:
    return count.sum(1).argsort(dim=0, descending=True, stable=True).int()


def _build(pattern: SparsePattern) -> BlockList:
    g, kept = pattern.geometry, pattern.kept
    device, heads = kept.device, kept.shape[0]
    grid_full, grid_ragged = divmod(g.grid_tokens, g.block_k)
    context_full, context_ragged = divmod(g.context_tokens, g.block_k)
    ids = [*range(grid_full), *range(g.k_blocks, g.k_blocks + context_full)]
    ragged = [g.k_blocks - 1] * bool(grid_ragged) + [g.k_blocks + context_full] * bool(context_ragged)
    if len(ids) + len(ragged) >= 1 << 15:
        raise ValueError(f"length: {g.length} tokens are more than the kernel's 16-bit block lists can name")
    columns = torch.tensor(ids + ragged, dtype=torch.int16, device=device)

    always_full = torch.ones(1, 1, context_full, dtype=torch.bool, device=device)
    always_ragged = torch.ones(1, 1, int(bool(context_ragged)), dtype=torch.bool, device=device)
    parts, fulls, counts, words = [], [], [], []
    bits = 1 << torch.arange(64, device=device)
    # nonzero needs three int64 per kept block.
    step = max(1, COMPACTION_BYTES // (24 * max(1, kept[0].numel())))
    for first in range(0, heads, step):
        some = kept[first : first + step]
        shape = (some.shape[0], g.q_blocks, -1)
        wide = torch.cat(
            [some[..., :grid_full], always_full.expand(shape), some[..., grid_full:], always_ragged.expand(shape)], 2
        )
        parts.append(columns[wide.nonzero()[:, 2]])
        counts.append(wide.sum(2))
        padded = torch.nn.functional.pad(some, (0, -g.k_blocks % 64 + 64)).unflatten(2, (-1, 64))
        words.append((padded * bits).sum(3))
        fulls.append(wide[..., : grid_full + context_full].sum(2))
    entries = sum(part.numel() for part in parts)
    padding = torch.zeros(LIST_PADDING, dtype=torch.int16, device=device)
    blocks = torch.cat([*parts, columns, padding])

    def with_context_row(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.functional.pad(torch.cat(rows), (0, 1), value=value).int()

    count = torch.cat(counts)
    start = (count.flatten().cumsum(0) - count.flatten()).view_as(count)
    row_order = torch.nn.functional.pad(
        count, (0, context_blocks(g.context_tokens, g.block_q)), value=columns.numel()
    ).argsort(dim=1, descending=True, stable=True)
    return BlockList(
        blocks,
        with_context_row([start], entries),
        with_context_row(fulls, len(ids)),
        with_context_row(counts, columns.numel()),
        torch.cat(words),
        _longest_heads_first(count),
        row_order.int(),
    )
