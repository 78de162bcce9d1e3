"""Token orders: permutations of a grid's tokens, known by name.

The six axis orders name the axes from slowest to fastest: FHW is the model's own order, HWF makes all frames of one
place neighbours. On one frame F does not matter, so HW and WH stand for FHW and FWH. Files store names, never numbers:
at least three numberings of these orders exist.

Tiled orders cut the grid into blocks of 64 tokens as near to a box as may be; `8x4x2` is a box of 8 frames, 4 rows, 2
columns. A block is then compact in all three axes, which suits heads with local 3-D attention, and what stands for all
of its tokens stands for them better than for those of a line. Few grids are whole numbers of boxes, and boxes that are
smaller at an edge would shift every block behind them across two boxes. So the tokens are halved again and again, each
time along the axis on which the part is longest in boxes, always at a whole number of blocks: every block but the last
has 64 tokens, and on a grid of whole boxes the blocks are boxes. Blocks are halved alike down to eight tokens, which
makes every aligned run of 8, 16 or 32 tokens compact too.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch

from ...kernels.core.layout import BLOCK_K

AXIS_ORDERS = tuple("".join(axes) for axes in permutations("FHW"))
ORIGINAL = AXIS_ORDERS[0]
TILED_ORDERS = ("4x4x4", "8x4x2", "8x2x4", "1x8x8")
# Tokens of the smallest parts.
FINEST = 8
ALL_ORDERS = AXIS_ORDERS + TILED_ORDERS


def candidate_orders(grid: tuple[int, int, int]) -> tuple[str, ...]:
    """Axis orders that differ on this grid, FHW first: ties prefer the model's own order.

    An axis of length 1 may stand anywhere without changing the permutation, so of the orders that coincide only the
    first is offered: two for an image, one for a line.
    """
    seen: dict[str, str] = {}
    for name in AXIS_ORDERS:
        seen.setdefault("".join(axis for axis in name if grid["FHW".index(axis)] > 1), name)
    return tuple(seen.values())


def tiled_orders(grid: tuple[int, int, int]) -> tuple[str, ...]:
    """Tiled orders whose boxes fit into this grid."""
    if min(grid[1:]) == 1:
        return ()
    return tuple(n for n in TILED_ORDERS if all(t <= s for t, s in zip(_tile(n), grid, strict=True)))


@lru_cache(maxsize=64)
def nearest_order(name: str, grid: tuple[int, int, int]) -> str:
    """What stands for an order on a grid where it may be no candidate: of axis orders the candidate that is the same
    permutation, of boxes the one most like it that fits, else the model's own order.

    It depends on nothing else: heads that share an order go on sharing one. Raises ValueError for a name that is no
    order.
    """
    order_number(name)
    if name in AXIS_ORDERS:
        return next(n for n in candidate_orders(grid) if torch.equal(order_table(n, grid), order_table(name, grid)))
    tile = _tile(name)

    def unlike(other: str) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(tile, _tile(other), strict=True))

    return min(tiled_orders(grid), key=unlike, default=ORIGINAL)


def _tile(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split("x")))


def _sorted_along(places: np.ndarray, axis: int, lengths: np.ndarray) -> np.ndarray:
    """How to sort `places [n, 3]` by an axis, then by the longer and the shorter of the others."""
    others = sorted((a for a in range(3) if a != axis), key=lambda a: -lengths[a])
    return np.lexsort([places[:, a] for a in (*others[::-1], axis)])


def _first_part(along: np.ndarray, tile: int, tokens: int) -> int | None:
    """Tokens of the first of two parts that are whole boxes along an axis and whole blocks, the evener the better.

    along: the part's coordinates on the axis. None where no such cut leaves both a quarter.
    """
    counts = np.bincount(along - along.min()).cumsum()[tile - 1 :: tile]
    good = counts[(counts % BLOCK_K == 0) & (4 * counts >= tokens) & (4 * counts <= 3 * tokens)]
    return int(good[np.abs(2 * good - tokens).argmin()]) if good.size else None


def _halved(places: np.ndarray, tile: np.ndarray) -> list[np.ndarray]:
    """Tokens `[n, 3]` (F, H, W) in blocks."""
    tokens = len(places)
    if tokens <= BLOCK_K:
        return [places]
    lengths = (np.ptp(places, 0) + 1) / tile
    longest = sorted(range(3), key=lambda a: -lengths[a])
    axis, first = longest[0], None
    for a in longest:
        if first is None and lengths[a] > 1 and 2 * lengths[a] >= lengths[longest[0]]:
            axis, first = a, _first_part(places[:, a], int(tile[a]), tokens)
    if first is None:
        axis, first = longest[0], -(-tokens // BLOCK_K) // 2 * BLOCK_K
    places = places[_sorted_along(places, axis, lengths)]
    return [*_halved(places[:first], tile), *_halved(places[first:], tile)]


def _halved_inside(blocks: np.ndarray, tile: np.ndarray) -> np.ndarray:
    """`[n, size, 3]`, each halved along its own longest axis, and the halves likewise down to FINEST tokens."""
    count, size, _ = blocks.shape
    # By the longest axis, then the next: one number to sort by. Coordinates are below 2^20.
    axes = (-(np.ptp(blocks, 1) + 1) / tile).argsort(1, kind="stable")
    keys = np.take_along_axis(blocks, axes[:, None, :], 2) @ np.array([1 << 40, 1 << 20, 1])
    blocks = np.take_along_axis(blocks, keys.argsort(1, kind="stable")[:, :, None], 1)
    if size <= FINEST:
        return blocks
    return _halved_inside(blocks.reshape(2 * count, size // 2, 3), tile).reshape(count, size, 3)


def _tiled(name: str, grid: tuple[int, int, int]) -> torch.Tensor:
    tile = np.array(_tile(name))
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
    blocks = _halved(places, tile)
    whole = [block for block in blocks if len(block) == BLOCK_K]
    if whole:
        blocks[: len(whole)] = _halved_inside(np.stack(whole), tile)
    places = np.concatenate(blocks)
    return torch.from_numpy(np.ravel_multi_index(tuple(places.T), grid).astype(np.int32))


def order_number(name: str) -> int:
    """Place in ALL_ORDERS. Raises ValueError for a name that is no order."""
    if name not in ALL_ORDERS:
        raise ValueError(f"order: {name!r} is none of {', '.join(ALL_ORDERS)}")
    return ALL_ORDERS.index(name)


@lru_cache(maxsize=64)
def order_table(name: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """int32 `[F*H*W]` on the CPU: the grid index of the token at each position of the order.

    Raises ValueError for a name that is no order.
    """
    order_number(name)
    f, h, w = grid
    index = torch.arange(f * h * w, dtype=torch.int32).view(f, h, w)
    if name in TILED_ORDERS:
        return _tiled(name, grid)
    return index.permute(["FHW".index(axis) for axis in name]).reshape(-1).contiguous()


@lru_cache(maxsize=32)
def table_on(name: str, grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """`order_table` on a device: every site of a run asks for the same ten."""
    return order_table(name, grid).to(device)


@lru_cache(maxsize=4)
def tables_on(names: tuple[str, ...], grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """int32 `[len(names), F*H*W]`: tables of some orders on a device."""
    return torch.stack([table_on(name, grid, device) for name in names])


@lru_cache(maxsize=4)
def order_tables(grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """int32 `[len(ALL_ORDERS), F*H*W]`: every order's table on the device, which all sites share."""
    return torch.stack([order_table(name, grid) for name in ALL_ORDERS]).to(device)
