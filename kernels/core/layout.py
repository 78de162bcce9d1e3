"""Token layouts: which tokens of a sequence are context, which form the grid, and how the grid is cut into blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

BLOCK_K = 64
BLOCK_Q_CHOICES = (64, 128)


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of `prefix` context tokens, a grid of F x H x W tokens (W fastest), `suffix` context tokens."""

    prefix: int
    grid: tuple[int, int, int]
    suffix: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(int(n) for n in self.grid))
        if len(self.grid) != 3 or min(self.grid) < 1 or self.prefix < 0 or self.suffix < 0:
            raise ValueError(f"layout: impossible token layout {self.prefix} + {self.grid} + {self.suffix}")

    @property
    def grid_tokens(self) -> int:
        """F*H*W."""
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """Tokens in the sequence."""
        return self.prefix + self.grid_tokens + self.suffix

    def describe(self) -> str:
        """For example `77 + 5x30x52 + 0`."""
        return f"{self.prefix} + {'x'.join(map(str, self.grid))} + {self.suffix}"


@dataclass(frozen=True)
class Geometry(TokenLayout):
    """A token layout and the size of its blocks, in tokens."""

    block_q: int = 64
    block_k: int = BLOCK_K

    @property
    def context_tokens(self) -> int:
        """Tokens that are never reordered and never dropped."""
        return self.prefix + self.suffix

    @property
    def q_blocks(self) -> int:
        """Query blocks over the grid; the last one may be ragged."""
        return -(-self.grid_tokens // self.block_q)

    @property
    def k_blocks(self) -> int:
        """Key blocks over the grid; the last one may be ragged."""
        return -(-self.grid_tokens // self.block_k)


def geometry_of(layout: TokenLayout, block_q: int) -> Geometry:
    """The layout, cut into blocks."""
    return Geometry(layout.prefix, layout.grid, layout.suffix, block_q)


def padded_dim(head_dim: int) -> int:
    """Head dimension the kernels work with: the next power of two, at least 32."""
    return max(32, 1 << (head_dim - 1).bit_length())
