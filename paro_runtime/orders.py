"""Token orders: permutations of a grid's tokens, known by name.

The six axis orders name the axes from slowest to fastest: FHW is the model's own order, HWF makes all frames of one
place neighbours. On one frame F does not matter, so HW and WH stand for FHW and FWH. Files store names, never numbers:
at least three numberings of these orders exist.

Tiled orders cut the grid into boxes of 64 tokens and walk box by box, F slowest, inside a box likewise; `8x4x2` is 8
frames, 4 rows, 2 columns. A block is then compact in all three axes, which suits heads with local 3-D attention, and
the mean key of a box stands for its tokens better than that of a line does.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations

import torch

AXIS_ORDERS = tuple("".join(axes) for axes in permutations("FHW"))
ORIGINAL = AXIS_ORDERS[0]
TILED_ORDERS = ("4x4x4", "8x4x2", "8x2x4", "1x8x8")
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


def _tile(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split("x")))


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
        # Sorting by box keeps the order inside a box; boxes at the far edges may be smaller.
        boxes = torch.zeros(f, h, w, dtype=torch.int64)
        for axis, (size, extent) in enumerate(zip(_tile(name), grid, strict=True)):
            shape = [1, 1, 1]
            shape[axis] = extent
            boxes = boxes * -(-extent // size) + (torch.arange(extent) // size).view(shape)
        return index.flatten()[boxes.flatten().argsort(stable=True)].contiguous()
    return index.permute(["FHW".index(axis) for axis in name]).reshape(-1).contiguous()


@lru_cache(maxsize=4)
def order_tables(grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """int32 `[len(ALL_ORDERS), F*H*W]`: every order's table on the device, which all sites share."""
    return torch.stack([order_table(name, grid) for name in ALL_ORDERS]).to(device)


@lru_cache(maxsize=64)
def token_coordinates(name: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """float32 `[F*H*W, 3]`: centre of each token in the order, in fractions of the grid's extent along F, H, W."""
    index = order_table(name, grid).long()
    _, h, w = grid
    columns = [index // (h * w), index // w % h, index % w]
    return torch.stack([(c.float() + 0.5) / n for c, n in zip(columns, grid, strict=True)], 1)
