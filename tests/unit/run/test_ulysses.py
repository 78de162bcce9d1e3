"""Heads split over ranks: two processes give what one gives, a rank's part of a plan, and what cannot be split."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.plan import PlanError, Site, SitePlan
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session
from comfyui_paro.paro_runtime.run.ulysses import Ulysses, plan_of_all
from comfyui_paro.tests import ranks

# After eight steps, from the rounding of the model's other layers, which see fewer rows at a time; measured 1e-6.
LATENT = 1e-5


@pytest.fixture(scope="module")
def one():
    with torch.inference_mode():
        return ranks.alone()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.run_ranks(2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name, heads, kv_heads, precision", ranks.CALLS)
def test_two_ranks_give_a_call_of_one_bit_for_bit(one, two, name, heads, kv_heads, precision):
    whole, padding = ranks.joined([its[name, heads] for its in two], ranks.STREAMS[name])
    assert torch.equal(whole, one[name, heads])
    assert padding.shape[2] and not padding.any()
    # With the ranks' heads exchanged, or with the plan's, it is another result: the comparison can fail.
    qkv, plan = ranks.call_of(heads, kv_heads, "cpu")
    half = [plan.of_rank(rank, 2).sites[ranks.SITE] for rank in (1, 0)]
    masks = torch.cat([entry.mask() for entry in half])
    biases, names = torch.cat([e.tail_bias[0] for e in half]), [n for e in half for n in e.orders]
    swapped = replace(plan, sites={ranks.SITE: SitePlan.create(names, masks, biases, torch.ones(heads))})
    for other in (one[name, heads].roll(heads // 2, 1), ranks.by_plan(swapped, precision)(*qkv)):
        assert (other - whole).norm() > 0.05 * whole.norm()


def test_a_plan_of_what_all_ranks_observed_is_that_of_one(one, two):
    for its in two:
        assert its["plan"].keys() == one["plan"].keys()
        for site, (orders, packed, bias, rotate) in one["plan"].items():
            assert its["plan"][site][0] == orders and its["plan"][site][3] == rotate
            assert torch.equal(its["plan"][site][1], packed)
            torch.testing.assert_close(its["plan"][site][2], bias, rtol=0, atol=1e-6)
    orders = [name for entry in one["plan"].values() for name in entry[0]]
    assert len(set(orders)) > 1


@pytest.mark.parametrize("plan", ["given plan", "on the way"])
def test_a_run_of_two_ranks_gives_the_latent_of_one(one, two, plan):
    assert one["sparse"] == two[0]["sparse"] == two[1]["sparse"] and one["sparse"]["sparse"] == 20
    assert torch.equal(two[0][plan], two[1][plan])
    assert (two[0][plan] - one[plan]).norm() < LATENT * one[plan].norm()


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_rank_has_its_heads_of_every_group_of_steps(count, masks):
    _, plan = ranks.call_of(8, 4, "cpu")
    orders, shape = plan.sites[ranks.SITE].orders, plan.sites[ranks.SITE].shape
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(3, *shape, generator=generator) < 0.5
    numbers = torch.rand(3, 2, 8, generator=generator)
    groups = [SitePlan.create(orders, kept[g], numbers[g, 0], numbers[g, 1], rotate=True) for g in range(3)]
    whole = SitePlan.joined(groups)
    plan = replace(plan, sites={ranks.SITE: whole if masks else whole.without_masks()})
    for rank in range(count):
        heads = slice(rank * 8 // count, (rank + 1) * 8 // count)
        own = plan.of_rank(rank, count).sites[ranks.SITE]
        assert own.orders == orders[heads] and own.shape == (8 // count, *shape[1:]) and own.rotate
        assert own.groups == 3 and own.has_masks == masks
        for group in range(3):
            if masks:
                assert torch.equal(own.mask(group=group), kept[group, heads])
            assert torch.equal(own.tail_bias[group], numbers[group, 0, heads])
            assert torch.equal(own.mass_kept[group], numbers[group, 1, heads])
            torch.testing.assert_close(own.density[group], kept[group, heads].float().mean((1, 2)))
    drop = replace(plan, sites={ranks.SITE: replace(whole, tail_bias=None)})
    assert drop.of_rank(0, count).sites[ranks.SITE].tail_bias is None


def test_heads_that_do_not_divide_and_wrong_lengths_are_refused_in_one_line(monkeypatch):
    (q, k, v), plan = ranks.call_of(8, 4, "cpu")
    with pytest.raises(PlanError, match=r"the 8 heads of block\.0\.0 do not divide over 3 ranks"):
        plan.of_rank(0, 3)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 8)
    ulysses = Ulysses((5, 192))
    assert (ulysses.local, ulysses.length) == (1 + 24, 197)
    part = [x[:, :, :25] for x in (q, k, v)]
    with pytest.raises(ValueError, match="8 query and 4 key heads do not divide over 8 ranks"):
        ulysses.attend(torch.nn.functional.scaled_dot_product_attention, *part)
    with pytest.raises(ValueError, match=r"\[197, 197, 197\] tokens .* \(5, 192\) over 8 ranks make 25"):
        Ulysses((5, 192)).attend(torch.nn.functional.scaled_dot_product_attention, q, q, q)


def test_ranks_that_observed_different_calls_make_no_plan(monkeypatch):
    calibrator, _ = ranks.observed("cpu", split=False)

    def gather(into, sums, group):
        into[0], into[1] = sums, {site: its for site, its in sums.items() if site != Site("block", 3)}

    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(PlanError, match="the ranks did not observe the same calls"):
        plan_of_all(calibrator, {})


def test_one_rank_alone_makes_no_evaluation_again(monkeypatch):
    from comfyui_paro.paro_runtime.host.wrappers import repeatable

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for world in (1, 2):
        monkeypatch.setattr(dist, "get_world_size", lambda its=world: its)
        assert repeatable(torch.nn.Linear(1, 1), {}) == (world == 1)


@pytest.mark.parametrize("masks", [True, False])
def test_a_plan_of_other_heads_is_not_used_and_says_so(masks):
    (q, k, v), plan = ranks.call_of(4, 4, "cpu")
    # One order for all: nothing but their number tells these heads from others.
    entry = replace(plan.sites[ranks.SITE], orders=("FHW",) * 4)
    plan = replace(plan, sites={ranks.SITE: entry if masks else entry.without_masks()})
    settings = Settings(preset="custom", density=0.4, dense_steps=0, min_tokens=0)
    for given, used in ((plan, False), (plan.of_rank(0, 2), True)):
        session = Session(Policy(ranks.IDENTITY, recipe_for("wan"), settings, given), sigmas=[1.0, 0.5, 0.0])
        evaluation = session.begin(layout=ranks.LAYOUT, sigma=1.0)
        dense = torch.zeros_like(q[:, :2])
        out = evaluation.attend(ranks.SITE, q[:, :2], k[:, :2], v[:, :2], dense=lambda its=dense: its)
        reasons = [reason for reason, _ in session.finish().fallbacks]
        assert (out is not dense) == used
        assert reasons == [] if used else reasons[0].endswith("plan: made for 4 heads, the call has 2")
