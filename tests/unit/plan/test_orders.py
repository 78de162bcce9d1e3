"""Token orders are permutations, named, and the ones that coincide are offered once."""

import math

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.plan.orders import (
    ALL_ORDERS,
    AXIS_ORDERS,
    candidate_orders,
    nearest_order,
    order_number,
    order_table,
    order_tables,
    tiled_orders,
)

GRIDS = [(5, 7, 9), (3, 17, 11), (1, 6, 4), (4, 1, 3), (1, 1, 5), (2, 2, 2)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", AXIS_ORDERS)
def test_a_table_walks_the_named_axes_from_slowest_to_fastest(name, grid):
    f, h, w = grid
    sizes = {"F": f, "H": h, "W": w}
    expected = []
    for a in range(sizes[name[0]]):
        for b in range(sizes[name[1]]):
            for c in range(sizes[name[2]]):
                at = dict(zip(name, (a, b, c), strict=True))
                expected.append((at["F"] * h + at["H"]) * w + at["W"])
    assert order_table(name, grid).tolist() == expected


@pytest.mark.parametrize(
    "grid, names",
    [
        ((5, 7, 9), AXIS_ORDERS),
        ((1, 6, 4), ("FHW", "FWH")),
        ((4, 1, 3), ("FHW", "HWF")),
        ((1, 1, 5), ("FHW",)),
    ],
)
def test_orders_that_coincide_are_offered_once_and_the_original_comes_first(grid, names):
    offered = candidate_orders(grid)
    assert offered == names
    tables = {tuple(order_table(name, grid).tolist()) for name in offered}
    assert len(tables) == len(offered)
    assert tables == {tuple(order_table(name, grid).tolist()) for name in AXIS_ORDERS}


def test_an_unknown_order_is_refused_by_name():
    with pytest.raises(ValueError, match="'FHX' is none of FHW"):
        order_table("FHX", (2, 2, 2))
    with pytest.raises(ValueError, match="'FHX' is none of FHW"):
        order_number("FHX")


@pytest.mark.parametrize("grid", GRIDS)
def test_the_tables_of_all_orders_are_made_once(grid):
    tables = order_tables(grid, torch.device("cpu"))
    assert order_tables(grid, torch.device("cpu")) is tables
    for name in ALL_ORDERS:
        assert torch.equal(tables[order_number(name)], order_table(name, grid))


@pytest.mark.parametrize("wrong", [(0, (0, 2, 2), 0), (-1, (1, 2, 2), 0), (0, (1, 2, 2), -3)])
def test_an_impossible_layout_is_refused(wrong):
    with pytest.raises(ValueError, match="layout"):
        TokenLayout(*wrong)


TILED_GRIDS = [(8, 12, 12), (9, 13, 11), (21, 30, 52), (1, 40, 25), (4, 4, 4), (5, 7, 9)]


def blocks_of(name, grid, size=64):
    """Coordinates of the tokens of each whole block, `[blocks, size, 3]`."""
    index = order_table(name, grid).long()
    places = torch.stack([index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]], 1)
    return places[: len(index) // size * size].view(-1, size, 3)


def test_tiled_orders_are_offered_where_their_boxes_fit():
    assert tiled_orders((1, 9, 20)) == ("1x8x8",) and tiled_orders((9, 1, 9)) == ()
    assert tiled_orders((8, 5, 3)) == ("8x4x2",)


@pytest.mark.parametrize("grid", TILED_GRIDS)
def test_tiled_orders_are_permutations(grid):
    for name in tiled_orders(grid):
        assert order_table(name, grid).sort().values.tolist() == list(range(math.prod(grid)))


@pytest.mark.parametrize(("name", "grid"), [("4x4x4", (8, 12, 12)), ("8x4x2", (8, 12, 12)), ("1x8x8", (1, 64, 40))])
def test_on_a_grid_of_whole_boxes_the_blocks_are_the_boxes(name, grid):
    tile = torch.tensor([int(n) for n in name.split("x")])
    boxes = blocks_of(name, grid) // tile
    assert (boxes == boxes[:, :1]).all()
    halves = blocks_of(name, grid, 8)
    assert ((halves.amax(1) - halves.amin(1) + 1).prod(1) == 8).all()


@pytest.mark.parametrize("grid", [(9, 13, 11), (21, 30, 52), (21, 45, 80), (1, 45, 80)])
def test_blocks_stay_compact_where_boxes_do_not_fit(grid):
    """The spread along each axis, in units of the box's own. Boxes laid side by side, smaller at the far edges, would
    come to between 3 and 50 on these grids."""
    for name in tiled_orders(grid):
        tile = torch.tensor([float(n) for n in name.split("x")])
        places = blocks_of(name, grid).float()
        spread = (places - places.mean(1, keepdim=True)).square().mean((0, 1))
        assert (spread <= 2 * (tile.square() - 1).clamp_min(1) / 12 + 0.3).all(), (name, spread)


@pytest.mark.parametrize("grid", [*GRIDS, (9, 13, 11), (1, 40, 64)])
def test_what_stands_for_an_order_is_a_candidate(grid):
    """One that is a candidate stands for itself, and an axis order for the same permutation."""
    candidates = candidate_orders(grid) + tiled_orders(grid)
    for name in ALL_ORDERS:
        found = nearest_order(name, grid)
        assert found in candidates and (name not in candidates or found == name)
        assert name not in AXIS_ORDERS or torch.equal(order_table(found, grid), order_table(name, grid))


@pytest.mark.parametrize(
    ("name", "grid", "nearest"),
    [
        ("4x4x4", (1, 40, 64), "1x8x8"),  # a video's box on an image
        ("8x4x2", (1, 40, 64), "1x8x8"),
        ("8x4x2", (5, 12, 12), "4x4x4"),  # too few frames
        ("1x8x8", (8, 6, 6), "4x4x4"),  # too few rows
        ("8x2x4", (1, 6, 40), "FHW"),  # no box at all
        ("1x8x8", (9, 13, 11), "1x8x8"),  # an image's box in a video
        ("WHF", (1, 40, 64), "FWH"),
    ],
)
def test_boxes_that_do_not_fit_give_way_to_the_most_alike(name, grid, nearest):
    assert nearest_order(name, grid) == nearest


def test_what_is_no_order_has_none_near():
    with pytest.raises(ValueError, match="'FFF' is none of"):
        nearest_order("FFF", (4, 8, 8))
