"""Plans on another grid: what a moved plan expects of each pair of blocks, which orders and blocks it keeps."""

import math
from dataclasses import replace

import pytest
import torch
from comfyui_paro.bench.paro_bench.generator import HARD, TEXT, make_problem
from comfyui_paro.bench.paro_bench.moved import SITE, kept_by, planted
from comfyui_paro.kernels.problem import BLOCK_K
from comfyui_paro.paro_runtime import portability
from comfyui_paro.paro_runtime.calibration import Calibrator
from comfyui_paro.paro_runtime.falloff import axis_bins, falloff_shape, pack_falloff
from comfyui_paro.paro_runtime.orders import order_table
from comfyui_paro.paro_runtime.plan import ModelIdentity, Plan, PlanError, SitePlan
from comfyui_paro.paro_runtime.portability import EXTRA, MovedPlanCheck, move_plan
from comfyui_paro.paro_runtime.recipes import MaskOptions
from comfyui_paro.paro_runtime.tokens import TokenLayout

from .test_falloff import bins_of_pairs

IDENTITY = ModelIdentity("bench", "planted", "planted")
OLD, NEW = (7, 9, 8), (7, 11, 12)


def calibrated(problem, order="mass") -> Plan:
    calibrator = Calibrator(IDENTITY, MaskOptions(0.25, order, "shared", None))
    calibrator.observe(SITE, TokenLayout(TEXT, problem.grid), problem.q[:-1], problem.k[:-1])
    return calibrator.plan({})


@pytest.fixture(scope="module")
def problems():
    return make_problem(OLD, HARD), make_problem(NEW, HARD)


@pytest.fixture(scope="module")
def plan(problems):
    return calibrated(problems[0])


def test_a_moved_plan_keeps_most_of_what_a_fresh_one_keeps_and_says_so(problems, plan):
    there = problems[1]
    moved = move_plan(plan, TokenLayout(TEXT, NEW))
    q, k = there.q[-1:], there.k[-1:]
    assert kept_by(moved, SITE, q, k) >= 0.95 * kept_by(calibrated(there), SITE, q, k)
    assert moved.made["moved_from"] == "7x9x8" and moved.layout.grid == NEW
    assert moved.density == pytest.approx(EXTRA * plan.density, abs=0.01)
    # Better than what the old grid kept: a longer sequence keeps another share at the same density.
    assert moved.mass_kept == pytest.approx(kept_by(moved, SITE, q, k), rel=0.05)
    check = MovedPlanCheck(moved)
    assert check.verdict() is None
    check.measure(SITE, moved.layout, q, k, scale=None, key_bias=None)
    stays, text = check.verdict()
    assert stays and "moved from the grid 7x9x8" in text and f"expected {moved.mass_kept:.1%}" in text
    # Uniform attention has nothing to do with the masks: what they keep falls to their density.
    strange = MovedPlanCheck(moved)
    strange.measure(SITE, moved.layout, torch.zeros_like(q), k, scale=None, key_bias=None)
    stays, text = strange.verdict()
    assert not stays and text.endswith("calibrating anew")
    # A site may run without the text that the others have beside the grid.
    bare = MovedPlanCheck(moved)
    bare.measure(SITE, TokenLayout(0, NEW), q[:, :, TEXT:], k[:, :, TEXT:], scale=None, key_bias=None)
    assert bare.verdict()[0]


@pytest.mark.parametrize("grid", [(5, 12, 12), (5, 12, 6)])
def test_a_move_to_more_resolution_and_to_another_aspect(grid):
    """From 5 x 8 x 8 places, on seeds that no constant was chosen on, at the acceptance's line."""
    for record in planted((5, 8, 8), grid, (0.2, 0.3), 11):
        assert record["share"] >= 0.95 and record["moved"] > record["density"] * 1.5
        assert record["oracle"] >= 0.9 * record["fresh"]


@pytest.mark.parametrize("order", ["FHW", "WHF", "4x4x4"])
@pytest.mark.parametrize("grid, block_q", [((3, 9, 7), 64), ((4, 6, 13), 128)])
def test_what_pairs_of_blocks_should_hold_is_the_sum_over_their_tokens(order, grid, block_q):
    """Ragged last blocks too."""
    if order == "4x4x4" and min(grid) < 4:
        grid = (4, 9, 7)
    weights = torch.exp(-6 * torch.rand(2, math.prod(falloff_shape(grid))))
    pairs = portability._Pairs.of(order, grid, block_q)
    draw = torch.rand(2, pairs.size.shape[1])
    table = order_table(order, grid).long()
    per_token = weights[:, bins_of_pairs(grid)[table][:, table]]
    per_row = torch.stack([part.sum(2) for part in per_token.split(BLOCK_K, 2)], 2)
    wanted = torch.stack([part.sum(1) for part in per_row.split(block_q, 1)], 1) * draw[:, None]
    found = pairs.expected(weights, draw)
    # Of a ragged last block some tokens count a little more than others.
    q, k = math.prod(grid) // block_q, math.prod(grid) // BLOCK_K
    torch.testing.assert_close(found[:, :q, :k], wanted[:, :q, :k], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0)
    some = portability._Pairs.of(order, grid, block_q, torch.tensor([1]))
    assert torch.equal(some.expected(weights, draw), found[:, 1:2])


@pytest.mark.parametrize("order", ["FHW", "HWF", "4x4x4"])
def test_few_samples_stand_for_all_tokens(order, monkeypatch):
    """A head that looks along time, the sharpest kind, by as many pairs of tokens as a 720p video has looked at."""
    grid = (6, 12, 10)
    away = [axis_bins(extent)[1] for extent in grid]
    weights = torch.exp(-away[1][:, None] - away[2]).expand(len(away[0]), -1, -1).reshape(1, -1)
    every = portability._Pairs.of(order, grid, 64)
    monkeypatch.setattr(portability, "TOKEN_PAIRS", every.size.numel() * 96)
    few = portability._Pairs.of(order, grid, 64)
    assert every.bins.shape[1] == 64**2 and few.bins.shape[1] == 96
    draw = torch.ones(1, every.size.shape[1])
    both = torch.stack([pairs.expected(weights, draw).flatten() for pairs in (few, every)])
    assert torch.corrcoef(both)[0, 1] > 0.95


def test_places_that_draw_attention_are_kept_on_the_other_grid():
    """A head without any falloff but with a sink in the last frame: its place is kept for every query."""
    old, new = (4, 8, 8), (4, 12, 12)
    received = torch.tensor([[1.0, 1.0, 1.0, 9.0]])
    falloff = torch.ones(1, math.prod(falloff_shape(old)))
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[:, :, :3] = False
    entry = SitePlan.create(("FHW",), mask, None, torch.ones(1), pack_falloff(falloff, received, ("FHW",), old))
    settings = {"order": "original"}
    moved = move_plan(Plan(IDENTITY, TokenLayout(0, old), 64, {SITE: entry}, 64, settings), TokenLayout(0, new))
    kept = moved.sites[SITE].mask()[0]
    last_frame = torch.arange(9) * 64 >= 3 * 144 - 63
    assert kept[:, ~last_frame].sum() == 0 and kept.float().mean() == pytest.approx(0.25 * EXTRA, abs=0.06)


def test_a_head_without_falloff_keeps_its_density():
    """Every pair of blocks of full size is expected to hold the same: none may slip in with the threshold."""
    expected = torch.ones(3, 20, 20)
    expected[1] = torch.rand(20, 20)
    mask = portability._best_blocks(expected, torch.tensor([0.1, 0.2, 0.3]))
    for head, density in enumerate((0.1, 0.2, 0.3)):
        assert density * 400 <= mask[head].sum() <= density * 400 + 20
    assert mask.any(2).all()
    best = expected[1].flatten().topk(80).indices
    assert mask[1].flatten()[best].all()


def test_neighbours_of_one_order_move_to_one_order_and_the_original_stays(problems, plan):
    """They may share keys, and the keys of a head are reordered once."""
    entry = plan.sites[SITE]
    heads = (0, 3, 2, 4)  # temporal, row; spatial, column: different orders suit them
    orders = ("HWF", "HWF", "FHW", "FHW")
    entry = SitePlan.create(orders, entry.mask()[list(heads)], None, torch.ones(4), entry.falloff[list(heads)])
    shared = move_plan(replace(plan, sites={SITE: entry}), TokenLayout(TEXT, NEW)).sites[SITE].orders
    assert shared[0] == shared[1] and shared[2] == shared[3]
    apart = replace(entry, orders=("HWF", "HFW", "FHW", "WFH"))
    alone = move_plan(replace(plan, sites={SITE: apart}), TokenLayout(TEXT, NEW)).sites[SITE].orders
    assert len(set(alone)) > 1
    original = move_plan(calibrated(problems[0], "original"), TokenLayout(TEXT, NEW))
    assert set(original.sites[SITE].orders) == {"FHW"}


def test_orders_that_do_not_suit_the_other_grid_are_changed(problems, plan):
    """Here they suit neither grid: FHW and FWH in turns, so that no two neighbours are bound to each other."""
    entry = replace(plan.sites[SITE], orders=("FHW", "FWH") * 6)
    wrong = replace(plan, sites={SITE: entry})
    q, k = problems[1].q[-1:], problems[1].k[-1:]
    moved = move_plan(wrong, TokenLayout(TEXT, NEW))
    kept = replace(moved, sites=portability._Move(wrong, NEW).sites({SITE: list(entry.orders)}))
    assert kept_by(moved, SITE, q, k) > kept_by(kept, SITE, q, k) + 0.05


def test_a_plan_that_does_not_know_its_falloff_serves_its_own_grid_only(plan):
    bare = replace(plan, sites={SITE: replace(plan.sites[SITE], falloff=None)})
    assert move_plan(bare, TokenLayout(0, OLD)).layout == TokenLayout(0, OLD)
    with pytest.raises(PlanError, match=r"plan: serves its own size of .* tokens only"):
        move_plan(bare, TokenLayout(TEXT, NEW))


def test_plans_on_one_frame_move(problems):
    images = [make_problem((1, 18, 20), HARD), make_problem((1, 27, 30), HARD)]
    moved = move_plan(calibrated(images[0]), TokenLayout(TEXT, (1, 27, 30)))
    q, k = images[1].q[-1:], images[1].k[-1:]
    assert kept_by(moved, SITE, q, k) >= 0.95 * kept_by(calibrated(images[1]), SITE, q, k)
