"""Queries, keys and values of one attention call, with the order in which each head takes the grid's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .layout import Geometry
from .sampling import of_key_heads


@dataclass(frozen=True, eq=False)
class ScoreInputs:
    """What the scores of an attention call follow from, whatever the order of the tokens.

    q         `[B, Hq, L, D]`, floating; where an operator says so, other queries than those of the L tokens.
    k         `[B, Hkv, L, D]`; Hq is a multiple of Hkv.
    scale     of the scores; None: 1 / sqrt(D).
    key_bias  additive `[B, L]` in original token order, -inf hides a key; or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    scale: float | None = field(default=None, kw_only=True)
    key_bias: torch.Tensor | None = field(default=None, kw_only=True)

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def dim(self) -> int:
        return self.q.shape[3]

    @property
    def score_scale(self) -> float:
        """The factor of the scores."""
        return self.dim**-0.5 if self.scale is None else self.scale

    def bias_stride(self) -> int:
        """Elements between the key biases of two batch entries, 0 without."""
        return 0 if self.key_bias is None else self.key_bias.stride(0)

    def with_values(self, v: torch.Tensor, geometry: Geometry, tables: torch.Tensor) -> AttentionInputs:
        """The same with values, in an order for each head."""
        return AttentionInputs(self.q, self.k, v, geometry, tables, scale=self.scale, key_bias=self.key_bias)


@dataclass(frozen=True, eq=False)
class AttentionInputs(ScoreInputs):
    """The arguments that the operators over sampled rows and pools have in common.

    v       like k.
    tables  int `[Hq, N]`: grid index at each position of the query head's order, N = geometry.grid_tokens.
    """

    v: torch.Tensor
    geometry: Geometry
    tables: torch.Tensor

    def of_heads(self, heads: slice) -> AttentionInputs:
        """The same of some query heads, which must be whole groups."""
        keys = of_key_heads(heads, self.group)
        return replace(self, q=self.q[:, heads], k=self.k[:, keys], v=self.v[:, keys], tables=self.tables[heads])
