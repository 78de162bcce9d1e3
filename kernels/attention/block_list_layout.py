"""How large the lists of kept blocks are, and when they are kept."""

from __future__ import annotations

from ..core.block_mask import row_words
from ..core.layout import Geometry

# The kernel's carried next indices read this far past the end of a row.
LIST_PADDING = 4
# Lists of one pattern up to this size are kept with it, larger ones made for each call, in its scratch memory: 40 heads
# of 14,000 tokens in blocks of 128 queries have as many. Sixty sites keep 120 MiB at most, and a call with more takes a
# millisecond, which hides a launch that writes a few megabytes.
LARGEST_KEPT_LIST = 2 << 20


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
