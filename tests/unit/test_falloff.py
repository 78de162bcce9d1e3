"""How attention falls off with distance: measured, stored in bytes, stretched to another grid."""

import math

import pytest
import torch
from comfyui_paro.bench.paro_bench.generator import HARD, TEXT, make_problem
from comfyui_paro.kernels.problem import BLOCK_K
from comfyui_paro.paro_runtime import falloff as falloff_module
from comfyui_paro.paro_runtime.falloff import (
    EDGES,
    axis_bins,
    falloff_shape,
    observe_falloff,
    pack_falloff,
    packed_width,
    stretch,
    unpack_falloff,
)
from comfyui_paro.paro_runtime.orders import order_table
from comfyui_paro.paro_runtime.tokens import TokenLayout

GRIDS = [(3, 5, 7), (1, 9, 20), (6, 1, 13), (1, 1, 70), (9, 10, 12)]


def bins_of_pairs(grid) -> torch.Tensor:
    """int64 `[N, N]`: the flat bin of every pair of tokens, one pair at a time."""
    tokens = [(f, h, w) for f in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    shape, edges = falloff_shape(grid), []
    for extent in grid:
        edges.append([edge for edge in EDGES if edge == 0 or edge < 0.75 * extent])
    table = torch.zeros(len(tokens), len(tokens), dtype=torch.long)
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            bins = [sum(abs(x - y) >= edge for edge in e) - 1 for x, y, e in zip(a, b, edges, strict=True)]
            table[i, j] = (bins[0] * shape[1] + bins[1]) * shape[2] + bins[2]
    return table


@pytest.mark.parametrize("grid, group_bytes", [(grid, 1 << 29) for grid in GRIDS[:4]] + [(GRIDS[0], 1)])
def test_the_falloff_is_the_mean_weight_at_each_distance(grid, group_bytes, monkeypatch):
    """All rows, two batch entries, shared keys, context on both sides and a key bias, against float64; in the last
    case one key head at a time."""
    monkeypatch.setattr(falloff_module, "GROUP_BYTES", group_bytes)
    torch.manual_seed(0)
    layout = TokenLayout(5, grid, 3)
    q, k = torch.randn(2, 4, layout.length, 16), torch.randn(2, 2, layout.length, 16)
    bias = torch.randn(2, layout.length)
    found = observe_falloff(q, k, layout, scale=0.7, key_bias=bias, rows=math.prod(grid))
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 0.7 + bias[:, None, None]
    part = slice(5, 5 + layout.grid_tokens)
    weights = logits.softmax(3)[:, :, part, part].mean(0).flatten(1)
    bins = bins_of_pairs(grid).flatten()
    counts = bins.bincount(minlength=math.prod(falloff_shape(grid)))
    wanted = torch.zeros(4, counts.numel(), dtype=torch.float64).index_add_(1, bins, weights) / counts
    assert counts.min() > 0
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)


def test_a_few_hundred_rows_stand_for_all():
    problem = make_problem((8, 13, 12), HARD, samples=(1,))
    layout = TokenLayout(TEXT, problem.grid)
    few, every = (observe_falloff(problem.q, problem.k, layout, rows=rows) for rows in (256, layout.grid_tokens))
    assert torch.corrcoef(torch.stack([few.flatten(), every.flatten()]))[0, 1] > 0.99
    assert (few > 0).all()


def test_long_axes_are_measured_by_fewer_rows(monkeypatch):
    monkeypatch.setattr(falloff_module, "ONE_HOT_ELEMENTS", 1)
    index, seen, _ = falloff_module._rows((1, 1, 999), 256, torch.device("cpu"))
    assert index.numel() == 32 and seen[2].shape[0] == 32
    falloff_module._rows.cache_clear()


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize("order", ["FHW", "WHF"])
def test_what_a_block_of_keys_receives_by_distance_alone(grid, order):
    falloff = torch.rand(math.prod(falloff_shape(grid)))
    per_key = falloff[bins_of_pairs(grid)].sum(0)[order_table(order, grid).long()]
    wanted = torch.stack([part.sum() for part in per_key.split(BLOCK_K)])
    torch.testing.assert_close(falloff_module._received(falloff[None], grid, [order])[0], wanted)


@pytest.mark.parametrize("grid", GRIDS)
def test_bytes_keep_weights_and_draws_to_a_few_percent(grid):
    torch.manual_seed(1)
    orders = ("FHW", "WHF", "HWF")
    falloff = torch.exp(-8 * torch.rand(3, math.prod(falloff_shape(grid))))
    plain = falloff_module._received(falloff, grid, orders)
    draw = torch.ones_like(plain)
    draw[:, -1] = 3
    packed = pack_falloff(7 * falloff, plain * draw, orders, grid)
    assert packed.shape == (3, packed_width(grid)) and packed.dtype == torch.uint8
    weights, found = unpack_falloff(packed, grid)
    relative = falloff / falloff.amax(1, keepdim=True)
    torch.testing.assert_close(weights.flatten(1), relative, rtol=0.052, atol=0)
    ratio = found / found[:, :1]
    torch.testing.assert_close(ratio, draw / draw[:, :1], rtol=0.052, atol=0)


def test_bytes_of_a_head_without_attention_are_finite():
    grid = GRIDS[0]
    packed = pack_falloff(torch.zeros(1, math.prod(falloff_shape(grid))), torch.zeros(1, 2), ("FHW",), grid)
    assert all(part.isfinite().all() and (part > 0).all() for part in unpack_falloff(packed, grid))


def test_distance_in_tokens_or_in_shares_of_the_extent():
    old, new = (1, 1, 40), (1, 1, 80)
    falloff = torch.exp(-axis_bins(40)[1] / 8).view(1, 1, 1, -1)
    assert torch.equal(stretch(falloff, old, old, False), stretch(falloff, old, old, True))
    torch.testing.assert_close(stretch(falloff, old, old, True), falloff)
    wanted, last = axis_bins(80)[1], axis_bins(40)[1][-1]
    for by_extent, distance in ((False, wanted), (True, wanted / 2)):
        found = stretch(falloff, old, new, by_extent).flatten()
        torch.testing.assert_close(found, torch.exp(-distance.clamp_max(last) / 8))
    assert stretch(falloff, old, (5, 1, 40), True).shape == (1, *falloff_shape((5, 1, 40)))


def test_the_falloff_is_a_thirtieth_of_a_plan_for_a_720p_video():
    """Per head of a 14B Wan at 720p: 2.6 kilobytes beside a mask of 87."""
    blocks = -(-21 * 45 * 80 // 128) * -(-21 * 45 * 80 // BLOCK_K)
    assert packed_width((21, 45, 80)) <= 0.03 * blocks / 8
    assert packed_width((1 << 8, 1 << 8, 1 << 8)) <= len(EDGES) ** 3 + (1 << 18)
