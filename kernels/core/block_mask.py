"""Which blocks are kept, in bits: as plans store them, and as the kernels read them.

Plans store one run of bits over all heads, rows and columns. Kernels take whole words: int64
`[H, q_blocks, row_words(k_blocks)]`, bit b of word w of a row for key block 64 w + b, and a word of zeros behind each
row, since a loop loads the next step's word a step ahead. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .layout import Geometry


def row_words(k_blocks: int) -> int:
    """Words of one row."""
    return -(-k_blocks // 64) + 1


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool tensor -> uint8 `[ceil(n / 8)]`, lowest bit first."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Inverse of `pack_bits`."""
    return _bits(packed).flatten()[: math.prod(shape)].view(shape)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 `[..., n]` -> bool `[..., n, 8]`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> places).bitwise_and_(1).view(torch.bool)


def words_of_bits(bits: torch.Tensor, heads: int, geometry: Geometry) -> torch.Tensor:
    """Words of a mask `[heads, q_blocks, k_blocks]` from its `pack_bits`, on their device.

    A row of blocks that keeps nothing gets the block at its own place: no softmax may be over nothing.
    """
    g = geometry
    words = words_of_rows(bits, (heads, g.q_blocks, g.k_blocks))
    words |= _own_words(g, bits.device) * (words == 0).all(2, keepdim=True)
    return torch.nn.functional.pad(words, (0, 1))


# What follows from sizes alone is kept: every site of a run asks for the same, and making it takes twenty launches.


@lru_cache(maxsize=2)
def _own_words(g: Geometry, device: torch.device) -> torch.Tensor:
    """Words of each row that keep the block at its own place: int64 `[q_blocks, ceil(k_blocks / 64)]`."""
    place = 64 * torch.arange(row_words(g.k_blocks) - 1, device=device)
    own = torch.arange(g.q_blocks, device=device)[:, None] * g.block_q // g.block_k
    return (own // 64 == place // 64).long() << (own % 64)


@lru_cache(maxsize=1)
def _word_places(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Of every word of a mask of so many rows, int64 `[rows, ceil(columns / 64)]`: which word of its bits it begins in,
    by how much that is shifted to the right, which bits are the word's then, how far the bits of the next one are
    shifted to the left and by one more; and, `[ceil(columns / 64)]`, which bits there are at all."""
    place = 64 * torch.arange(row_words(columns) - 1, device=device)
    first = torch.arange(0, rows * columns, columns, device=device)[:, None] + place
    shift = first & 63
    return (
        first >> 6,
        shift,
        ~((-1 << (63 - shift)) << 1),
        63 - shift,
        ~((-1 << (columns - 1 - place).clamp_max(63)) << 1),
    )


def words_of_rows(bits: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """The bits of each row in whole words, from `pack_bits` of a mask of this shape: int64
    `[heads, q_blocks, ceil(k_blocks / 64)]`."""
    heads, q_blocks, columns = shape
    rows = heads * q_blocks
    source = torch.nn.functional.pad(bits, (0, 8 * (rows * columns // 64 + 2) - bits.numel())).view(torch.int64)
    word, right, upper, left, there = _word_places(rows, columns, bits.device)
    # A word's bits lie in two neighbours. Shifts to the right repeat the sign, and none may be by 64: in two parts.
    words = source[word].bitwise_right_shift_(right).bitwise_and_(upper)
    words |= source[1:][word].bitwise_left_shift_(left).bitwise_left_shift_(1)
    words &= there
    return words.view(heads, q_blocks, -1)


def mask_of_words(words: torch.Tensor, k_blocks: int) -> torch.Tensor:
    """bool `[..., k_blocks]` from words `[..., row_words(k_blocks)]`: eight times their memory, or a byte a block."""
    return _bits(words.view(torch.uint8)[..., : -(-k_blocks // 8)]).flatten(-2)[..., :k_blocks]


def count_bits(words: torch.Tensor) -> torch.Tensor:
    """Bits that are set in each word, int64."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return x * 0x0101010101010101 >> 56
