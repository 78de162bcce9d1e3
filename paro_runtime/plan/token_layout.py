"""Token layouts: which tokens of a sequence are text or references, and which form the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
