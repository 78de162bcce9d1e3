"""What one attention call is: where its tokens come from, in which order, which blocks are kept, how precise.

Every kernel and every reference takes these objects. The *reordered sequence* of a head is its grid tokens in the
head's order followed by the context tokens (prefix, then suffix) in their own order. Both parts start at a block
boundary of their own, so a block never mixes grid and context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .block_mask import count_bits, mask_of_words, pack_bits, row_words, words_of_bits
from .layout import BLOCK_K, BLOCK_Q_CHOICES, Geometry

# As many rows as the smallest product of the tensor cores has.
MOST_EXPANSIONS = 16


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """What one site's heads look at.

    tables        int32 [n_orders, grid_tokens]: tables[o, j] is the grid index (F slowest, W fastest) of the token
                  that stands at position j of order o.
    order_of_head int32 [kv_heads]: the order of each key/value head; the query heads of a group share it.
    kept_words    int64 [q_heads, q_blocks, row_words(k_blocks)]: the kept blocks in bits (`block_mask`), at least one
                  in every row; None keeps every block.
    tail_bias     float32 [q_heads]: c of each head. Beside its kept keys a query q sees every pooled key k of the
                  blocks that it drops, with the logit scale * q.k + b + c: b is the pool's own bias
                  (`pooling.reference`), and e^c what the head's whole tail is weighed with. None: no tail.
    pool          tokens per pooled key; divides block_k.
    expansions    mean queries per head at most around which the pools are expanded (`pooling.reference`); 0: the pools
                  are plain means.
    """

    geometry: Geometry
    tables: torch.Tensor
    order_of_head: torch.Tensor
    kept_words: torch.Tensor | None = None
    tail_bias: torch.Tensor | None = None
    pool: int = BLOCK_K
    expansions: int = 0

    @classmethod
    def from_mask(
        cls,
        geometry: Geometry,
        tables: torch.Tensor,
        order_of_head: torch.Tensor,
        mask: torch.Tensor,
        tail_bias: torch.Tensor | None = None,
        pool: int = BLOCK_K,
        expansions: int = 0,
    ) -> SparsePattern:
        """From a bool mask `[q_heads, q_blocks, k_blocks]`, True = kept; ValueError with one line for another."""
        if mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[1:] != (geometry.q_blocks, geometry.k_blocks):
            expected = f"[q_heads, {geometry.q_blocks}, {geometry.k_blocks}]"
            raise ValueError(f"mask: expected bool {expected}, got {mask.dtype} {list(mask.shape)}")
        words = words_of_bits(pack_bits(mask), mask.shape[0], geometry)
        return cls(geometry, tables, order_of_head, words, tail_bias, pool, expansions)

    def tables_of_heads(self, query_heads: int) -> torch.Tensor:
        """Grid index at each position of each query head's order, int32 `[query_heads, N]`."""
        return self.tables[self.order_of_head.long()].repeat_interleave(query_heads // self.kv_heads, 0)

    @property
    def kv_heads(self) -> int:
        return self.order_of_head.shape[0]

    @property
    def density(self) -> float:
        """Kept blocks / all blocks over the grid-to-grid part, mean over heads."""
        if self.kept_words is None:
            return 1.0
        blocks = self.kept_words.shape[0] * self.geometry.q_blocks * self.geometry.k_blocks
        return count_bits(self.kept_words).sum().item() / blocks

    @property
    def mask(self) -> torch.Tensor | None:
        """bool `[q_heads, q_blocks, k_blocks]`, True = kept; unpacked whenever it is asked for."""
        return None if self.kept_words is None else mask_of_words(self.kept_words, self.geometry.k_blocks)

    def to(self, device: torch.device | str) -> SparsePattern:
        """The same pattern on another device."""
        if self.tables.device == torch.device(device):
            return self

        def move(tensor):
            return None if tensor is None else tensor.to(device)

        return SparsePattern(
            self.geometry,
            move(self.tables),
            move(self.order_of_head),
            move(self.kept_words),
            move(self.tail_bias),
            self.pool,
            self.expansions,
        )


def empty_output(q: torch.Tensor) -> torch.Tensor:
    """Uninitialised `[B, H, L, D]` in q's dtype, stored as `[B, L, H, D]` where q is: what the host reads it as.

    A host that holds its tokens as `[B, L, H * D]` would copy any other layout.
    """
    _, heads, length, dim = q.shape
    if q.stride(2) > q.stride(1):
        strides = (length * heads * dim, dim, heads * dim, 1)
        return torch.empty_strided(q.shape, strides, dtype=q.dtype, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def problem_with(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: SparsePattern) -> str | None:
    """Say in one line what makes this call impossible, or None. Tensors are `[B, H, L, D]`."""
    g = pattern.geometry
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return f"q, k, v must be [B, H, L, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return f"q, k, v do not fit together: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if q.shape[2] != g.length or k.shape[2] != g.length:
        return f"length: the layout has {g.length} tokens, q has {q.shape[2]} and k has {k.shape[2]}"
    if q.shape[1] % k.shape[1]:
        return f"heads: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads"
    if pattern.kv_heads != k.shape[1]:
        return f"order_of_head: {pattern.kv_heads} entries for {k.shape[1]} key heads"
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        return f"dtype: q, k, v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    if not (q.device == k.device == v.device == pattern.tables.device == pattern.order_of_head.device):
        return f"device: q is on {q.device}, k on {k.device}, v on {v.device}, the pattern on {pattern.tables.device}"
    if pattern.tables.dim() != 2 or pattern.tables.shape[1] != g.grid_tokens:
        return f"tables: expected [n_orders, {g.grid_tokens}], got {tuple(pattern.tables.shape)}"
    if g.block_q not in BLOCK_Q_CHOICES or g.block_k != BLOCK_K:
        return (
            f"block sizes: queries {BLOCK_Q_CHOICES} and keys {BLOCK_K} are supported, got {g.block_q} and {g.block_k}"
        )
    words = pattern.kept_words
    if words is not None:
        expected = (q.shape[1], g.q_blocks, row_words(g.k_blocks))
        if tuple(words.shape) != expected or words.dtype != torch.int64:
            return f"kept_words: expected int64 {expected}, got {words.dtype} {tuple(words.shape)}"
        if words.device != q.device:
            return f"kept_words: on {words.device}, q is on {q.device}"
    if pattern.tail_bias is not None and tuple(pattern.tail_bias.shape) != (q.shape[1],):
        return f"tail_bias: expected [{q.shape[1]}], got {tuple(pattern.tail_bias.shape)}"
    if pattern.pool < 1 or g.block_k % pattern.pool:
        return f"pool: {pattern.pool} does not divide the key block of {g.block_k}"
    if not 0 <= pattern.expansions <= MOST_EXPANSIONS:
        return f"expansions: 0 to {MOST_EXPANSIONS} mean queries per head are supported, got {pattern.expansions}"
    return None
