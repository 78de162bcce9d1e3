"""What observing one site costs in multiply-adds: at most three dense attentions where grids are small, 1.3 on the
smallest of the large ones, and ever less above, on a GPU and on a CPU.

Torch's own products are counted as they run. The Triton kernels are counted by what is launched, rows and keys that
only fill a tile included; that this count is right is checked against the interpreter's products.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter

import pytest
import torch
from comfyui_paro.kernels.core.inputs import ScoreInputs
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.kernels.core.pattern import MOST_EXPANSIONS
from comfyui_paro.kernels.core.support import interpreted
from comfyui_paro.kernels.statistics import api as statistics_api
from comfyui_paro.kernels.tail_error import api as tail_error_api
from comfyui_paro.paro_runtime.calibration.observe import observe
from comfyui_paro.paro_runtime.calibration.options import SHARED_TOKENS, StatisticsOptions
from comfyui_paro.paro_runtime.calibration.order_choice import SHARED_ROWS
from comfyui_paro.paro_runtime.plan.options import query_block
from torch.utils.flop_counter import FlopCounterMode

TILE = 64
H100 = (9, 0)
# Smallest sizes, images, one frame after another, prime sides, and both sides of every size at which the way changes.
GRIDS = (
    (8, 8, 8),
    (3, 13, 14),
    (5, 11, 11),
    (7, 7, 13),
    (1, 31, 33),
    (8, 12, 12),
    (9, 13, 11),
    (2, 37, 41),
    (13, 15, 21),
    (16, 16, 16),
    (1, 64, 64),
    (12, 18, 19),
    (17, 241, 1),
    (7, 19, 31),
    (13, 18, 20),
    (19, 19, 19),
    (1, 83, 97),
    (8, 32, 32),
    (12, 18, 38),
    (1, 128, 128),
)


# Masks by mass want the sums of more rows, which small grids have anyway. There the head dimension changes nothing.
CASES = [(grid, dim, False) for grid in GRIDS for dim in (64, 128)]
CASES += [(grid, 64, True) for grid in GRIDS if math.prod(grid) > SHARED_ROWS]
of_every_case = pytest.mark.parametrize(
    "grid, dim, by_mass",
    CASES,
    ids=[f"{'x'.join(map(str, grid))}, {dim}, by {'mass' if by_mass else 'error'}" for grid, dim, by_mass in CASES],
)


def _cells(a: dict, rows: int, keys: int, products: int) -> int:
    return products * rows * keys * a["PADDED_D"]


def _statistics(a: dict, grid: tuple[int, ...]) -> int:
    rows = max(a["PER_BLOCK"], a["ROWS"])
    return math.prod(grid) * _cells(a, rows, -(-a["k_blocks"] // a["BLOCKS"]) * a["BLOCKS"] * a["KEYS"], 1)


def _moments(a: dict, grid: tuple[int, ...]) -> int:
    tiles, parts, entries = grid
    return tiles * parts // a["splits"] * entries * _cells(a, a["ROWS"], a["blocks"] * a["KEYS"], 3)


def _pool_moments(a: dict, grid: tuple[int, ...]) -> int:
    """A program goes over the pools once for every stretch that its rows lie in, from the first to the last."""
    _, masks, entries = grid
    stretch = a["positions"] // a["BLOCK_Q"] * a["stretches"] // a["q_blocks"]
    passes = sum((rows.max() - rows.min() + 1).item() for rows in stretch.split(a["ROWS"]))
    return passes * masks * entries * _cells(a, a["ROWS"], -(-a["pools"] // a["POOLS"]) * a["POOLS"], 2)


# Multiply-adds of one launch: from its arguments by name, and its grid.
LAUNCHES = {
    "triton_statistics._take_rows": lambda a, grid: 0,
    "triton_statistics._row_logsumexp": lambda a, grid: (
        math.prod(grid) * _cells(a, a["ROWS"], -(-a["length"] // a["KEYS"]) * a["KEYS"], 1)
    ),
    "triton_statistics._block_statistics": _statistics,
    "triton_query_sums._query_logs": lambda a, grid: (
        math.prod(grid) * _cells(a, a["ROWS"], -(-a["blocks"] // a["BLOCKS"]) * a["BLOCKS"] * a["KEYS"], 1)
    ),
    "triton_query_sums._query_sums": lambda a, grid: 0,
    "triton_block_costs._row_outputs": lambda a, grid: (
        math.prod(grid) * _cells(a, a["ROWS"], -(-a["length"] // a["KEYS"]) * a["KEYS"], 2)
    ),
    "triton_block_costs._block_costs": lambda a, grid: (
        math.prod(grid) * _cells(a, a["ROWS"], a["k_blocks"] * a["KEYS"], 4)
    ),
    "triton_row_errors._row_sums": _moments,
    "triton_row_errors._row_moments": _pool_moments,
    "triton_pools._mean_queries": lambda a, grid: 0,
    "triton_pools._expand": lambda a, grid: (
        math.prod(grid)
        * (a["KEYS"] // a["POOL"])
        * _cells(a, MOST_EXPANSIONS, a["KEYS"], 3 if a["key_weights"] is None else 4)
    ),
}


@pytest.fixture
def launches(monkeypatch):
    """Counts multiply-adds by kernel, of a GPU's path; `launches.run = True` also runs the kernels."""
    pytest.importorskip("triton")
    from comfyui_paro.kernels.pooling import triton_pools
    from comfyui_paro.kernels.statistics import triton_query_sums, triton_statistics
    from comfyui_paro.kernels.tail_error import triton_block_costs, triton_row_errors

    every = (triton_row_errors, triton_pools, triton_query_sums, triton_statistics, triton_block_costs)
    modules = {module.__name__.split(".")[-1]: module for module in every}
    found = Counter()
    found.run = False

    class Launch:
        def __init__(self, name, kernel, count):
            self.name, self.kernel, self.count = name, kernel, count
            self.parameters = list(inspect.signature(kernel.fn).parameters)

        def __getitem__(self, grid):
            def launch(*args, **options):
                named = dict(zip(self.parameters, args, strict=False)) | options
                found[self.name] += self.count(named, grid)
                if found.run:
                    self.kernel[grid](*args, **options)

            return launch

    for path, count in LAUNCHES.items():
        module, name = path.split(".")
        kernel = getattr(modules[module], name)
        monkeypatch.setattr(modules[module], name, Launch(name, kernel, count))
    for module in (statistics_api, tail_error_api):
        monkeypatch.setattr(module, "uses_reference", lambda *_: False)
    return found


def multiply_adds(grid, dim: int, by_mass: bool, dtype=torch.float32, prefix: int = 0) -> int:
    """Of torch's matrix products while one head is observed with its tail and every candidate order."""
    layout = TokenLayout(prefix, grid)
    q, k, v = torch.randn(3, 1, 1, layout.length, dim).to(dtype)
    with FlopCounterMode(display=False) as counted:
        observe(
            ScoreInputs(q, k), layout, query_block(layout.grid_tokens), StatisticsOptions(0.1, by_mass=by_mass), v=v
        )
    return counted.get_total_flops() // 2


@of_every_case
def test_on_a_gpu(launches, monkeypatch, grid, dim, by_mass):
    """With the tiles of an H100, the tallest; dense attention in tiles of 64 x 64. What the kernels would compute is
    left out, and what is in its place does not matter: what is launched depends on sizes only."""
    from comfyui_paro.kernels.statistics import triton_statistics
    from comfyui_paro.kernels.tail_error import triton_row_errors

    tile = triton_statistics.statistics_tile(H100, dim, wide=False)
    monkeypatch.setattr(triton_statistics, "tile_of", lambda _: tile)
    monkeypatch.setattr(triton_row_errors, "capability_of", lambda _: H100)
    torch_products = multiply_adds(grid, dim, by_mass, torch.float16)
    dense = 2 * (-(-math.prod(grid) // TILE) * TILE) ** 2 * dim
    large = math.prod(grid) > SHARED_TOKENS
    assert bool(launches["_block_costs"]) != (large and by_mass) and launches["_row_sums"] and launches["_expand"]
    share = (sum(launches.values()) + torch_products) / dense
    assert 0.5 * (0.1 if large else 1) < share <= (1.3 if large else 3)


@of_every_case
def test_on_a_cpu(grid, dim, by_mass):
    large = math.prod(grid) > SHARED_TOKENS
    share = multiply_adds(grid, dim, by_mass) / (2 * math.prod(grid) ** 2 * dim)
    assert 0.5 * (0.1 if large else 1) < share <= (1.3 if large else 3)


def test_the_sizes_reach_every_way():
    sizes = [math.prod(grid) for grid in GRIDS]
    for edge in (SHARED_ROWS, SHARED_TOKENS):
        assert any(edge - 16 <= size <= edge for size in sizes) and any(edge < size <= edge + 16 for size in sizes)
    assert min(sizes) == 512


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("by_mass", [False, True])
def test_launches_are_counted_right(launches, monkeypatch, by_mass):
    """Every product of the interpreter, on a grid that is observed as a large one is."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name in ("options.SHARED_TOKENS", "order_choice.SHARED_ROWS"):
        monkeypatch.setattr(f"comfyui_paro.paro_runtime.calibration.{name}", 0)
    launches.run, done, create_dot = True, Counter(), InterpreterBuilder.create_dot

    def counting(self, a, b, *rest):
        done["multiply-adds"] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    multiply_adds((2, 9, 13), 64, by_mass, torch.float16, prefix=5)
    every = {path.split(".")[1] for path in LAUNCHES}
    # Masks by mass: no errors of single blocks, but mean queries. Block sums of every row are for smaller grids.
    missing = {"_take_rows", "_row_logsumexp", "_block_statistics"} | (
        {"_row_outputs", "_block_costs"} if by_mass else set()
    )
    assert launches.keys() == every - missing
    assert done["multiply-adds"] == sum(launches.values())
