"""Masks measured anew in runs whose plan was made of pure noise: what is measured, when, and what trouble does."""

import itertools
from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.problem import Geometry
from comfyui_paro.kernels.support import interpreted
from comfyui_paro.paro_runtime import evaluation as evaluation_module
from comfyui_paro.paro_runtime import second_look as second_look_module
from comfyui_paro.paro_runtime.attempt import Attempt
from comfyui_paro.paro_runtime.attention import pattern_of
from comfyui_paro.paro_runtime.calibration import Method
from comfyui_paro.paro_runtime.correction import QueryCorrection
from comfyui_paro.paro_runtime.mean_queries import mean_queries_of_blocks, mean_query_masses
from comfyui_paro.paro_runtime.orders import order_table
from comfyui_paro.paro_runtime.patterns import PatternCache
from comfyui_paro.paro_runtime.plan import ModelIdentity, Plan, Site, SitePlan
from comfyui_paro.paro_runtime.plan_store import PlanStore
from comfyui_paro.paro_runtime.recipes import recipe_for
from comfyui_paro.paro_runtime.refresh import BiasRefresh
from comfyui_paro.paro_runtime.second_look import SecondLook, masks_anew
from comfyui_paro.paro_runtime.selection import masks_of_counts
from comfyui_paro.paro_runtime.session import IN_PASSING, Policy, Session
from comfyui_paro.paro_runtime.settings import Settings
from comfyui_paro.paro_runtime.tokens import TokenLayout

LAYOUT = TokenLayout(3, (5, 8, 9), 2)
SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
SITE = Site("block", 0)
IDENTITY = ModelIdentity("wan", "a" * 16, "b" * 16)


def test_the_best_blocks_of_each_head_as_many_as_it_may_keep():
    worth = torch.rand(5, 7, 9).square()
    counts = torch.tensor([7, 8, 20, 40, 63])
    masks, fewer = masks_of_counts(worth, torch.stack([counts, counts - 7]))
    assert (fewer <= masks).all() and fewer.sum((1, 2)).tolist()[2:] == [13, 33, 56]
    assert masks.sum((1, 2)).tolist() == counts.tolist()
    for head in range(5):
        best = worth[head].argmax(1)
        assert masks[head].gather(1, best[:, None]).all()
        # Beside the best of every row: nothing that is dropped is worth more than what is kept.
        others = masks[head].scatter(1, best[:, None], False)
        dropped = worth[head][~masks[head]]
        if others.any() and dropped.numel():
            assert worth[head][others].min() > dropped.max()


def test_of_many_blocks_about_as_many_as_it_may_keep():
    worth = torch.rand(3, 300, 400, generator=torch.Generator().manual_seed(0)).square()
    worth[2] *= torch.linspace(0.01, 1, 300)[:, None]
    counts = torch.tensor([[60_000, 24_000, 12_000], [30_000, 12_000, 6_000]])
    for mask, wanted in zip(masks_of_counts(worth, counts), counts, strict=True):
        torch.testing.assert_close(mask.sum((1, 2)).float(), wanted.float(), rtol=0.04, atol=0)
        for head in range(3):
            rows = torch.arange(300)
            assert mask[head, rows, worth[head].argmax(1)].all()


def test_fewer_than_a_block_a_row_and_blocks_worth_nothing():
    worth = torch.zeros(2, 6, 8)
    worth[:, :, 3] = torch.rand(2, 6) + 0.1
    worth[1, 2, 5] = 1e-42
    (masks,) = masks_of_counts(worth, torch.tensor([[2, 40]]))
    assert masks[:, :, 3].all() and masks[0].sum() == 6
    assert masks[1].sum() == 7 and masks[1, 2, 5]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("tokens, block_q", [((5, 8, 9), 64), ((5, 8, 9), 128), ((1, 5, 13), 64), ((1, 1, 66), 64)])
def test_mean_queries_are_of_the_parts_of_each_block(tokens, block_q, backend):
    if backend == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    g = Geometry(3, tokens, 2, block_q)
    q = torch.randn(2, 3, g.length, 40, dtype=torch.float16)
    tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(3)]).int()
    found = mean_queries_of_blocks(q, g, tables, 4, backend)
    assert found.shape == (2, 3, 4 * g.q_blocks, 40) and found.dtype == q.dtype
    for head in range(3):
        order = tables[head].long() + g.prefix
        for block in range(g.q_blocks):
            its = order[block * block_q : (block + 1) * block_q]
            ends = [part * len(its) // 4 for part in range(5)]
            for part, (a, b) in enumerate(itertools.pairwise(ends)):
                # A block of fewer rows than parts: rows of it.
                rows = its[a:b] if len(its) >= 4 else its[len(its) * (2 * part + 1) // 8, None]
                expected = q[:, head, rows].double().mean(1)
                torch.testing.assert_close(found[:, head, 4 * block + part].double(), expected, atol=2e-3, rtol=0)


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype, block_q", [(torch.float16, 128), (torch.float32, 64)])
def test_masses_of_mean_queries_are_alike_in_the_interpreter(dtype, block_q):
    """Grouped heads, two batch entries, text, views as the host gives them."""
    g = Geometry(3, (5, 8, 9), 2, block_q)
    q, k = (torch.randn(2, g.length, n, 40).to(dtype).transpose(1, 2) for n in (4, 2))
    tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(2)]).int().repeat_interleave(2, 0)
    found, expected = (mean_query_masses(q, k, g, tables, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kv_heads, biased, block_q", [(4, False, 64), (2, True, 64), (2, False, 128)])
def test_masses_are_the_attention_of_the_mean_queries(kv_heads, biased, block_q, monkeypatch):
    g = Geometry(3, (5, 8, 9), 2, block_q)
    q = torch.randn(2, 4, g.length, 16)
    k = torch.randn(2, kv_heads, g.length, 16)
    tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(kv_heads)]).int()
    tables = tables.repeat_interleave(4 // kv_heads, 0)
    bias = torch.randn(2, g.length) if biased else None
    if biased:  # of text: block sums leave out what keys of the grid have
        bias[:, g.prefix : g.prefix + g.grid_tokens] = 0
    call, rest = (q, k, g, tables), {"scale": 0.3, "key_bias": bias, "backend": "reference"}
    found = mean_query_masses(*call, **rest)
    for head in range(4):
        order = tables[head].long() + g.prefix
        keys = k[:, head // (4 // kv_heads)].double()
        for block in range(g.q_blocks):
            its = order[block * block_q : (block + 1) * block_q]
            ends = [part * len(its) // 4 for part in range(5)]
            means = torch.stack([q[:, head, its[a:b]].double().mean(1) for a, b in itertools.pairwise(ends)], 1)
            logits = means @ keys.mT * 0.3
            if biased:
                logits += bias[:, None].double()
            weights = logits.softmax(2)[:, :, order].mean(0).sum(0) * len(its) / 4
            expected = torch.stack([part.sum() for part in weights.split(64)])
            torch.testing.assert_close(found[head, block].double(), expected, atol=1e-4, rtol=1e-4)
    # Heads in groups that fit the memory give the same.
    monkeypatch.setattr("comfyui_paro.paro_runtime.tail.GROUP_BYTES", 1)
    torch.testing.assert_close(mean_query_masses(*call, **rest), found)


def test_looks_in_the_first_call_of_the_second_sparse_step():
    look = SecondLook()
    assert [look.due("a", step) for step in (3, 3, 4, 4, 5)] == [False, False, True, False, False]
    assert [look.due("b", step) for step in (4, 6, 7)] == [False, True, False]
    assert look.sites == 2 and look.looks("a", 4) and look.looks("b", 6)
    assert not look.looks("a", 5) and not look.looks("c", 4)
    look.forget()
    assert look.sites == 0 and not look.looks("a", 4) and not look.due("a", 8) and look.due("a", 9)


def entry_of(masks):
    """A site of two heads with three groups of masks."""
    parts = [
        SitePlan.create(("HWF", "WFH"), mask, torch.tensor([0.1 * i, 0.2]), torch.tensor([0.9, 0.8 - i / 10]))
        for i, mask in enumerate(masks)
    ]
    return replace(SitePlan.joined(parts), rotate=True, falloff=torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("group", [0, 1])
def test_masks_of_this_group_and_those_behind_it_are_made_anew(group):
    masks = torch.rand(3, 2, 6, 6) < torch.tensor([0.6, 0.4, 0.2])[:, None, None, None]
    masks |= torch.eye(6, dtype=torch.bool)
    masks[:, 1] |= torch.rand(6, 6) < 0.3
    entry = entry_of(masks)
    q, k = torch.randn(2, 1, 2, LAYOUT.length, 16)
    sizes = {"block_q": 64, "pool": 64, "expansions": 16, "kv_heads": 2, "device": torch.device("cpu")}
    pattern = pattern_of(entry, LAYOUT, group=group, **sizes)
    look = SecondLook()
    bits = masks_anew(entry, group, q, k, pattern, scale=None, key_bias=None)
    fresh = look.keep(entry, group, bits)
    look.finish()
    assert torch.equal(pattern_of(fresh, LAYOUT, group=group, **sizes).mask, fresh.mask(group=group))
    assert torch.equal(pattern_of(entry, LAYOUT, group=group, bits=bits[0], **sizes).mask, fresh.mask(group=group))
    assert (fresh.orders, fresh.shape, fresh.groups, fresh.rotate) == (entry.orders, entry.shape, 3, True)
    for name in ("falloff", "tail_bias", "mass_kept", "density"):
        torch.testing.assert_close(getattr(fresh, name), getattr(entry, name))
    masses = mean_query_masses(q, k, pattern.geometry, pattern.tables[pattern.order_of_head.long()])
    for each in range(3):
        mask = fresh.mask(group=each)
        if each < group:
            assert torch.equal(mask, masks[each])
        else:
            assert not torch.equal(mask, masks[each])
            assert torch.equal(mask, masks_of_counts(masses, masks[each].sum((1, 2))[None])[0])


def run(dense_steps=1, conditionings=((0,),), seed=0, sigmas=SIGMAS, skip=(), **more):
    """A run of one site, without the steps `skip`; the session, with the masks after every evaluation."""
    settings = {"preset": "custom", "density": 0.3, "precision": "16bit", "dense_steps": dense_steps}
    settings = Settings(**settings | more.pop("settings", {}))
    policy = Policy(IDENTITY, recipe_for("wan"), settings, more.pop("plan", None), more.pop("store", None), True)
    session = Session(policy, sigmas=sigmas, **more)
    generator = torch.Generator().manual_seed(seed)
    session.masks = []
    for sigma in (sigma for step, sigma in enumerate(sigmas[:-1]) if step not in skip):
        for its in conditionings:
            q, k, v = torch.randn(3, 1, 4, LAYOUT.length, 32, generator=generator)
            evaluation = session.begin(layout=LAYOUT, sigma=sigma, conditionings=its)
            evaluation.attend(SITE, q, k, v, dense=lambda v=v: v.clone(), blocks=1)
            evaluation.end()
            plan = session._grids[LAYOUT.grid].plan
            # A plan that was found has no sites yet in a dense step.
            session.masks.append(plan.sites[SITE].packed.clone() if plan is not None and plan.sites else None)
    return session


def test_a_run_whose_plan_is_of_pure_noise_looks_again_once(tmp_path):
    session = run(store=PlanStore([], tmp_path))
    assert session.masks[0] is None  # the dense step
    first, second, *others = session.masks[1:]
    assert not torch.equal(first, second) and all(torch.equal(each, second) for each in others)
    # Two groups are over or under way; the first has one step and keeps what it had.
    assert torch.equal(first[0], second[0])
    report = session.finish()
    assert report.sites_looked_at_again == 1 and not report.fallbacks and not report.notes
    assert "masks measured anew after a plan of pure noise: 1 of 1 sites" in report.text()
    # The plan that was saved is what the dense step showed; a run that finds it looks again as well.
    again = run(store=PlanStore([], tmp_path), seed=1)
    assert again.finish().plan_source == "plan found" and torch.equal(again.masks[1], first)
    assert not torch.equal(again.masks[-1], first) and not torch.equal(again.masks[-1], second)


@pytest.mark.parametrize("at_once", [False, True])
def test_nothing_stays_of_an_attempt_that_fails(at_once):
    """Masks, bias and corrections of a site that saw what is not finite in the step that measures them."""
    runs = []
    for fails in (False, True):
        policy = Policy(IDENTITY, recipe_for("wan"), Settings(preset="custom", density=0.3, dense_steps=1))
        session = Session(policy, sigmas=SIGMAS)
        generator = torch.Generator().manual_seed(0)
        for step, sigma in enumerate(SIGMAS[:4]):
            q, k, v = torch.randn(3, 1, 4, LAYOUT.length, 32, generator=generator)
            session.second_look.at_once = at_once
            # A site at fault in the first attempt, and with it what comes after.
            for again in (False, True) if fails and step == (1 if at_once else 2) else (True,):
                attempt = Attempt(session, can_redo=True)
                evaluation = session.begin(layout=LAYOUT, sigma=sigma, attempt=attempt, again=not again)
                bad = v if again else v * torch.nan
                evaluation.attend(Site("block", 1), q, k, bad, dense=lambda v=v: v.clone(), blocks=2)
                evaluation.attend(SITE, q if again else q * torch.nan, k, bad, dense=lambda v=v: v.clone(), blocks=2)
                assert evaluation.end(0) is not again
                session.off_sites.clear()
        runs.append(session)
    clean, redone = runs
    key = (SITE, LAYOUT.grid)
    plans = [session._grids[LAYOUT.grid].plan.sites[SITE] for session in runs]
    assert torch.equal(plans[0].packed, plans[1].packed) and plans[0].mask().any(2).all()
    assert torch.equal(clean.refresh.bias(key), redone.refresh.bias(key))
    assert torch.equal(clean.correction._shares[key].shares, redone.correction._shares[key].shares)


def test_calls_of_one_step_share_the_masks():
    session = run(conditionings=((0,), (1,)))
    masks = session.masks[2:]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert all(torch.equal(each, masks[2]) for each in masks[2:])


@pytest.mark.parametrize("short, measured", [(False, [1, 3, 6, 11]), (True, [3])])
def test_what_goes_by_the_masks_is_measured_with_the_new_ones(monkeypatch, short, measured):
    """The site looks again in its third step here, where no group begins. Calls that are short on a GPU are measured
    once, and not under the masks that are given up."""
    monkeypatch.setattr(evaluation_module, "is_short", lambda q: short)
    biases, corrections = [], []
    measure, apply = BiasRefresh.measure, QueryCorrection.apply

    def watched_measure(self, key, step, q, k, v, pattern, **rest):
        biases.append((step, pattern.mask))
        return measure(self, key, step, q, k, v, pattern, **rest)

    def watched_apply(self, key, call, step, due, q, k, v, out, pattern, **rest):
        corrections.append((step, due, pattern.mask))
        return apply(self, key, call, step, due, q, k, v, out, pattern, **rest)

    monkeypatch.setattr(BiasRefresh, "measure", watched_measure)
    monkeypatch.setattr(QueryCorrection, "apply", watched_apply)
    # Fifteen sparse steps, five in each group, of which the second is left out.
    session = run(sigmas=[1 - step / 16 for step in range(17)], skip=(2,))
    assert [step for step, _ in biases] == measured
    due = {step: due for step, due, _ in corrections}
    assert [step for step in due if due[step]] == measured
    new = session.finish().plan.sites[SITE].mask()
    assert all(torch.equal(mask, new) == (step > 1) for step, mask in biases if step < 6)
    assert all(torch.equal(mask, new) == (step > 1) for step, _, mask in corrections if step < 6)


def test_a_run_with_one_sparse_step_measures_in_that(monkeypatch):
    """No second look will come that would do it."""
    steps = []

    def watched(self, key, step, *rest, measure=BiasRefresh.measure, **more):
        steps.append(step)
        return measure(self, key, step, *rest, **more)

    monkeypatch.setattr(BiasRefresh, "measure", watched)
    assert run(sigmas=[1.0, 0.5, 0.0]).finish().sites_looked_at_again == 0 and steps == [1]


def test_other_sites_keep_their_patterns():
    entry = SitePlan.create(("FHW",) * 4, torch.rand(4, 6, 6) < 0.4, torch.zeros(4), torch.ones(4))
    other = Site("block", 1)
    plan, cache = Plan(IDENTITY, LAYOUT, 64, {SITE: entry, other: entry}), PatternCache()

    def words(site, bits=None):
        return cache.get(site, plan, 0, LAYOUT, 4, torch.device("cpu"), bits).kept_words

    first, second = words(SITE), words(other)
    fresh = words(SITE, entry.packed[0].clone())
    assert fresh is not first and torch.equal(fresh, first)
    assert words(SITE) is fresh and words(other) is second and len(cache) == 2


def test_masks_have_arrived_before_they_are_read(monkeypatch):
    """Where the device has no room for patterns, those of masks measured anew are made of what was kept of them."""
    monkeypatch.setattr("comfyui_paro.paro_runtime.patterns.CACHE_BYTES", 0)
    arrived, session = [], run(sigmas=[1.0, 0.5, 0.0])
    monkeypatch.setattr(session.second_look, "finish", lambda: arrived.append(1))
    entry = session._grids[LAYOUT.grid].plan.sites[SITE]
    where = (SITE, session._grids[LAYOUT.grid].plan, 0, LAYOUT, 4, torch.device("cpu"))
    session.patterns.get(*where, entry.packed[0])
    assert not arrived
    session.patterns.get(*where)
    assert len(arrived) == 1
    session.finish()
    assert len(arrived) == 2


@pytest.mark.parametrize(
    "more",
    [
        {"dense_steps": 2},  # saw more than noise
        {"settings": {"tail": "off"}},
        {"refresh": False},
        {"method": Method(criterion="mass")},
        {"method": Method(criterion="error")},
        {"highest_noise": 2.0},  # began with a picture
    ],
)
def test_other_runs_keep_their_masks(more):
    session = run(**more)
    first = next(mask for mask in session.masks if mask is not None)
    assert torch.equal(session.masks[-1], first)
    assert session.finish().sites_looked_at_again == 0


@pytest.mark.parametrize(
    "made", [{"by": "PARO Calibrate", "criterion": "mass"}, {"by": IN_PASSING, "criterion": "error"}]
)
def test_plans_of_more_than_noise_keep_their_masks(made):
    masks = torch.rand(1, 4, 6, 6) < 0.4
    entry = SitePlan.create(("FHW",) * 4, masks[0], torch.zeros(4), torch.ones(4))
    plan = Plan(IDENTITY, LAYOUT, 64, {SITE: entry}, made=made)
    session = run(plan=plan)
    assert torch.equal(session.masks[-1], entry.packed) and session.finish().sites_looked_at_again == 0


def test_trouble_leaves_the_masks_and_the_run(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(second_look_module, "mean_query_masses", broken)
    session = run()
    report = session.finish()
    assert torch.equal(session.masks[-1], session.masks[1])
    assert report.notes == ["masks are not measured anew: RuntimeError: no such kernel"]
    assert report.sites_sparse == 1 and not report.fallbacks and report.sites_looked_at_again == 0
    with pytest.raises(RuntimeError, match="no such kernel"):
        run(settings={"strict": True})


def test_query_heads_go_by_the_order_of_their_key_head():
    names = ("HWF", "HWF", "WFH", "WFH")
    entry = SitePlan.create(names, torch.ones(4, 6, 6, dtype=torch.bool), torch.zeros(4), torch.ones(4))
    sizes = {"block_q": 64, "pool": 64, "expansions": 16, "kv_heads": 2, "device": torch.device("cpu")}
    found = pattern_of(entry, LAYOUT, group=0, **sizes).tables_of_heads(4)
    assert torch.equal(found, torch.stack([order_table(name, LAYOUT.grid) for name in names]))
