"""Which rows and heads are looked at, where all would take too long or too much memory."""

from __future__ import annotations

import torch

from .gather import block_positions
from .layout import Geometry

# Rows looked at in every query block.
ROWS_PER_BLOCK = 16
# Bytes of block tables and of attention rows that may be held at a time; heads are done in groups that fit.
GROUP_BYTES = 1 << 29


def sampled_rows(geometry: Geometry, device: torch.device, rows: int = ROWS_PER_BLOCK) -> torch.Tensor:
    """Positions in the order, int64 `[q_blocks, rows]`, spread evenly over each block, or what there is of it."""
    return block_positions(geometry, torch.arange(geometry.q_blocks, device=device), rows)[0]


def spread_positions(tokens: int, count: int, device: torch.device) -> torch.Tensor:
    """Positions evenly spread over so many tokens, int64 `[count]`, or as many as there are."""
    count = min(tokens, count)
    return ((torch.arange(count, device=device) + 0.5) / count * tokens).long()


def head_groups(heads: int, group: int, bytes_per_head: int) -> list[slice]:
    """Slices of the query heads that fit GROUP_BYTES; the `group` heads that share a key head stay together."""
    count = heads // group
    parts = -(-count // max(1, GROUP_BYTES // (bytes_per_head * group)))
    step = -(-count // parts) * group
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


def of_key_heads(some: slice, group: int) -> slice:
    """The key heads of some query heads, of which each `group` share one."""
    return slice(some.start // group, some.stop // group)
