"""What must hold for every input, on inputs that a library draws and makes small when one of them fails."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from comfyui_paro.kernels.core.block_mask import mask_of_words, pack_bits, unpack_bits, words_of_bits
from comfyui_paro.kernels.core.layout import Geometry, TokenLayout
from comfyui_paro.paro_runtime.calibration.mask_choice import SharedBudget, masks_by, masks_of_counts
from comfyui_paro.paro_runtime.plan.file import load_plan, save_plan
from comfyui_paro.paro_runtime.plan.options import GROUPS, MaskOptions, falling_densities, query_block
from comfyui_paro.paro_runtime.plan.orders import candidate_orders, order_table, tiled_orders
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Plan, Site, SitePlan
from comfyui_paro.paro_runtime.run.schedule import Schedule, StepFinder
from hypothesis import given, settings
from hypothesis import strategies as st

# Nothing is kept between runs: every run draws anew, and a failure prints what it was.
checked = settings(max_examples=60, deadline=None, database=None)
sides = st.integers(1, 13)
grids = st.tuples(sides, sides, sides)
seeds = st.integers(0, 1 << 30)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@checked
@given(grids)
def test_every_order_has_every_token_once(grid):
    tokens = grid[0] * grid[1] * grid[2]
    for name in candidate_orders(grid) + tiled_orders(grid):
        assert torch.equal(order_table(name, grid).sort().values, torch.arange(tokens, dtype=torch.int32)), name


@checked
@given(st.integers(1, 4), grids, st.sampled_from((64, 128)), st.floats(0, 1), seeds)
def test_masks_come_back_from_bits_and_words(heads, grid, block_q, density, seed):
    g = Geometry(0, grid, 0, block_q)
    mask = torch.rand(heads, g.q_blocks, g.k_blocks, generator=drawn(seed)) < density
    bits = pack_bits(mask)
    assert torch.equal(unpack_bits(bits, tuple(mask.shape)), mask)
    words = words_of_bits(bits, heads, g)
    found = mask_of_words(words, g.k_blocks)
    empty = ~mask.any(2)
    assert torch.equal(found[~empty], mask[~empty])
    # No softmax over nothing: a row without a block keeps the one at its own place.
    assert (found[empty].sum(1) == 1).all() and (words[..., -1] == 0).all()


@checked
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 60), st.booleans(), seeds)
def test_heads_keep_their_heaviest_blocks(heads, rows, columns, wanted, ties, seed):
    worth = torch.rand(heads, rows, columns, generator=drawn(seed))
    if ties:
        worth = (worth * 4).ceil()
    (mask,) = masks_of_counts(worth, torch.full((1, heads), min(wanted, rows * columns)))
    best = torch.zeros_like(mask).scatter_(2, worth.argmax(2, keepdim=True), True)
    assert mask[best].all()
    for head in range(heads):
        others, dropped = worth[head][mask[head] & ~best[head]], worth[head][~mask[head]]
        assert not others.numel() or not dropped.numel() or others.min() > dropped.max()
        assert mask[head].sum() >= min(max(wanted, rows), rows * columns)
        if not ties:
            assert mask[head].sum() == min(max(wanted, rows), rows * columns)


@checked
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=4), st.floats(0.02, 1), seeds)
def test_a_shared_budget_is_kept(sites, density, seed):
    generator = drawn(seed)
    masses = [torch.rand(heads, side, side, generator=generator).square() for heads, side in sites]
    masks = masks_by(SharedBudget, masses, density)
    blocks, rows = sum(m.numel() for m in masks), sum(m.shape[0] * m.shape[1] for m in masks)
    kept = sum(int(mask.sum()) for mask in masks)
    assert all(mask.any(2).all() for mask in masks)
    # As many as asked for; more where every row's best and every head's floor are more than that.
    floors = sum(heads * int(density / 4 * side * side) for heads, side in sites)
    assert round(density * blocks) <= kept <= max(round(density * blocks), rows + floors)


@checked
@given(st.floats(0.001, 1), st.floats(1, 8))
def test_falling_densities_have_the_mean_that_was_asked_for(density, fall):
    found = falling_densities(density, fall)
    assert len(found) == GROUPS and sum(found) / GROUPS == pytest.approx(density)
    assert all(0 < each <= 1 + 1e-9 for each in found) and list(found) == sorted(found, reverse=True)


@checked
@given(st.integers(1, 50), st.data())
def test_parts_of_a_schedule_have_its_dense_steps_and_groups(steps, data):
    """However a schedule is cut into samplers: experts, stages, single steps."""
    cuts = data.draw(st.lists(st.integers(1, max(1, steps - 1)), max_size=4, unique=True).map(sorted))
    dense = data.draw(st.integers(0, steps))
    edges = [0, *(cut for cut in cuts if cut < steps), steps]
    sigmas = [1 - step / steps for step in range(steps + 1)]

    def schedule(part):
        return Schedule.of_run(part, lambda whole: dense, "", lambda sigma: 1 - sigma)

    parts = [schedule(sigmas[a : b + 1]) for a, b in itertools.pairwise(edges)]
    every = [(part.is_dense_step(step), part.group(step, GROUPS)) for part in parts for step in range(part.steps)]
    assert len(every) == steps and [each for each, _ in every] == [step < dense for step in range(steps)]
    whole = schedule(sigmas)
    groups = [group for is_dense, group in every if not is_dense]
    assert groups == [whole.group(step, GROUPS) for step in range(dense, steps)] == sorted(groups)
    if steps - dense >= GROUPS:
        assert set(groups) == set(range(GROUPS))


@checked
@given(st.lists(st.integers(-3000, 3000), min_size=2, max_size=40, unique=True), st.booleans())
def test_every_step_is_found_by_its_noise(levels, rising):
    """Levels that differ by more than half precision may move them."""
    sigmas = [1.002**level for level in sorted(levels, reverse=not rising)]
    finder = StepFinder(sigmas)
    for step, sigma in enumerate(sigmas[:-1]):
        assert finder.find(sigma, step - 1) == step == finder.find(sigma, step)


@settings(max_examples=25, deadline=None, database=None)
@given(
    grids.filter(lambda grid: grid[0] * grid[1] * grid[2] >= 64), st.integers(1, 3), st.booleans(), st.booleans(), seeds
)
def test_plans_come_back_as_they_were_saved(grid, heads, masks, tail, seed):
    generator, layout = drawn(seed), TokenLayout(seed % 5, grid, seed % 3)
    block_q = query_block(layout.grid_tokens)
    shape = (heads, -(-layout.grid_tokens // block_q), -(-layout.grid_tokens // 64))
    names = candidate_orders(grid) + tiled_orders(grid)
    sites = {}
    for index in range(2):
        groups = []
        for _ in range(GROUPS):
            mask = torch.rand(shape, generator=generator) < 0.4
            mask[:, :, seed % shape[2]] = True
            bias = torch.randn(heads, generator=generator) if tail else None
            orders = [names[int(torch.randint(len(names), (1,), generator=generator))] for _ in range(heads)]
            groups.append(SitePlan.create(orders, mask, bias, torch.rand(heads, generator=generator)))
        entry = SitePlan.joined(groups)
        bare = {} if masks else {"packed": torch.empty(GROUPS, 0, dtype=torch.uint8)}
        sites[Site("double", index)] = SitePlan(**{**entry.__dict__, **bare})
    options = MaskOptions(0.3, "mass", "shared", 64)
    plan = Plan(ModelIdentity("wan", "a" * 16, "b" * 16), layout, block_q, sites, 64, options.as_dict(), {"by": "test"})
    with tempfile.TemporaryDirectory() as folder:
        save_plan(plan, Path(folder) / "p.safetensors")
        found = load_plan(Path(folder) / "p.safetensors")
    assert (found.identity, found.layout, found.settings, found.groups) == (
        plan.identity,
        layout,
        plan.settings,
        GROUPS,
    )
    for site, entry in sites.items():
        its = found.sites[site]
        assert its.orders == entry.orders and its.shape == entry.shape and its.has_masks == masks
        assert torch.equal(its.packed, entry.packed) and torch.equal(its.density, entry.density)
        assert (its.tail_bias is None) != tail and (not tail or torch.equal(its.tail_bias, entry.tail_bias))
