"""Masks that runs measure themselves: what is measured, when, and what trouble does."""

import itertools

import pytest
import torch
from comfyui_paro.kernels.core.inputs import ScoreInputs
from comfyui_paro.kernels.core.layout import Geometry, TokenLayout
from comfyui_paro.kernels.core.support import interpreted
from comfyui_paro.kernels.statistics.mean_queries import mean_queries_of_blocks, mean_query_masses
from comfyui_paro.paro_runtime.attention.patterns import PatternCache, pattern_of
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator, Method
from comfyui_paro.paro_runtime.calibration.mask_choice import masks_of_counts
from comfyui_paro.paro_runtime.calibration.observe import budget_blocks
from comfyui_paro.paro_runtime.config.recipes import mask_options, recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.file import load_plan
from comfyui_paro.paro_runtime.plan.options import GROUPS
from comfyui_paro.paro_runtime.plan.orders import order_table
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Plan, Site, SitePlan
from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.run import evaluation as evaluation_module
from comfyui_paro.paro_runtime.run import masks as routing_module
from comfyui_paro.paro_runtime.run.masks import routed_bits
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session
from comfyui_paro.paro_runtime.run.tail_bias import TailBiasUpdate

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
    found, expected = (
        mean_query_masses(ScoreInputs(q, k), g, tables, backend=backend) for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("parts", [4, 16])
@pytest.mark.parametrize("kv_heads, biased, block_q", [(4, False, 64), (2, True, 64), (2, False, 128)])
def test_masses_are_the_attention_of_the_mean_queries(kv_heads, biased, block_q, parts, monkeypatch):
    monkeypatch.setattr("comfyui_paro.kernels.statistics.mean_queries.FEW_TOKENS", 8192 if parts == 16 else 0)
    g = Geometry(3, (5, 8, 9), 2, block_q)
    q = torch.randn(2, 4, g.length, 16)
    k = torch.randn(2, kv_heads, g.length, 16)
    tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(kv_heads)]).int()
    tables = tables.repeat_interleave(4 // kv_heads, 0)
    bias = torch.randn(2, g.length) if biased else None
    if biased:  # of text: block sums leave out what keys of the grid have
        bias[:, g.prefix : g.prefix + g.grid_tokens] = 0
    scores = ScoreInputs(q, k, scale=0.3, key_bias=bias)
    found = mean_query_masses(scores, g, tables)
    for head in range(4):
        order = tables[head].long() + g.prefix
        keys = k[:, head // (4 // kv_heads)].double()
        for block in range(g.q_blocks):
            its = order[block * block_q : (block + 1) * block_q]
            ends = [part * len(its) // parts for part in range(parts + 1)]
            means = torch.stack([q[:, head, its[a:b]].double().mean(1) for a, b in itertools.pairwise(ends)], 1)
            logits = means @ keys.mT * 0.3
            if biased:
                logits += bias[:, None].double()
            weights = logits.softmax(2)[:, :, order].mean(0).sum(0) * len(its) / parts
            expected = torch.stack([part.sum() for part in weights.split(64)])
            torch.testing.assert_close(found[head, block].double(), expected, atol=1e-4, rtol=1e-4)
    # Heads in groups that fit the memory give the same.
    monkeypatch.setattr("comfyui_paro.kernels.core.sampling.GROUP_BYTES", 1)
    torch.testing.assert_close(mean_query_masses(scores, g, tables), found)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_masses_of_some_query_blocks_are_those_of_all(kv_heads):
    g = Geometry(3, (5, 8, 9), 2, 64)
    q, k = torch.randn(2, 4, g.length, 16), torch.randn(2, kv_heads, g.length, 16)
    tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(kv_heads)]).int()
    tables = tables.repeat_interleave(4 // kv_heads, 0)
    some = budget_blocks(g, q.device)
    assert some.tolist() == [0, 1, 2, 3, 4]  # the last of six has 40 rows
    found, every = (mean_query_masses(ScoreInputs(q, k), g, tables, q_blocks=blocks) for blocks in (some, None))
    torch.testing.assert_close(found, every[:, some])


def bare_entry(density=((0.6, 0.5), (0.4, 0.3), (0.2, 0.35))):
    """A site of two heads and three groups of steps without masks."""
    density = torch.tensor(density)
    return SitePlan(
        ("HWF", "WFH"), torch.empty(3, 0, dtype=torch.uint8), (2, 6, 6), torch.zeros(3, 2), density, torch.ones(3, 2)
    )


@pytest.mark.parametrize("group, masked", [(0, False), (2, False), (0, True)])
def test_heads_keep_the_heaviest_blocks_as_many_as_the_plan_says(group, masked):
    entry = bare_entry()
    q, k = torch.randn(2, 1, 2, LAYOUT.length, 16)
    bias = torch.zeros(1, LAYOUT.length)
    bias[:, 3:150] = -10.0
    scores = ScoreInputs(q, k, scale=1.0, key_bias=bias) if masked else ScoreInputs(q, k)
    sizes = {"block_q": 64, "pool": 64, "expansions": 16, "kv_heads": 2, "device": torch.device("cpu")}
    seen = []

    def measure(pattern):
        seen.append(pattern)
        return routed_bits(entry, group, scores, pattern)

    made = pattern_of(entry, LAYOUT, group=group, measure=measure, **sizes)
    assert seen[0].kept_words is None
    masses = mean_query_masses(scores, made.geometry, made.tables_of_heads(2))
    counts = (entry.density[group] * 36).round().long()
    assert torch.equal(made.mask, masks_of_counts(masses, counts[None])[0])
    assert torch.equal(made.tail_bias, entry.tail_bias[group])


def run(dense_steps=1, calls=1, seed=0, sigmas=SIGMAS, **more):
    """A run of one site; the session, with the masks in use after every sparse evaluation, by step."""
    settings = {"preset": "custom", "density": 0.3, "precision": "16bit", "dense_steps": dense_steps}
    settings = Settings(**settings | more.pop("settings", {}))
    policy = Policy(IDENTITY, recipe_for("wan"), settings, more.pop("plan", None), more.pop("store", None), True)
    session = Session(policy, sigmas=sigmas, **more)
    generator = torch.Generator().manual_seed(seed)
    session.masks = {}
    for step, sigma in enumerate(sigmas[:-1]):
        for _ in range(calls):
            q, k, v = torch.randn(3, 1, 4, LAYOUT.length, 32, generator=generator)
            evaluation = session.begin(layout=LAYOUT, sigma=sigma)
            evaluation.attend(SITE, q, k, v, dense=lambda v=v: v.clone(), blocks=1)
            evaluation.end()
            found = list(session.patterns._patterns.values())
            if found:
                session.masks.setdefault(step, []).append(found[0].mask)
    return session


# Eight sparse steps, of which three are in the first group, two in the second.
LONG = [1 - step / 9 for step in range(10)]


def test_a_run_of_little_but_noise_measures_its_masks_in_each_group(tmp_path):
    session = run(store=PlanStore([], tmp_path), sigmas=LONG)
    plan = session._grids[LAYOUT.grid].plan
    groups = [session.schedule.group(step, GROUPS) for step in session.masks]
    assert list(session.masks) == list(range(1, 9)) and set(groups) == {0, 1, 2}
    masks = [its[0] for its in session.masks.values()]
    for (before, mask), (group, following) in zip(itertools.pairwise(masks), itertools.pairwise(groups), strict=True):
        assert torch.equal(before, mask) == (group == following)
    for mask, group in zip(masks, groups, strict=True):
        torch.testing.assert_close(mask.float().mean((1, 2)), plan.sites[SITE].density[group], atol=0.02, rtol=0)
    report = session.finish()
    assert report.sites_routed == 1 and not report.fallbacks and not report.notes
    assert "1 of 1 attention layers choose their blocks from this run's own picture" in report.text()
    # The plan that was saved has none; a run that finds it measures its own.
    assert not load_plan(next(tmp_path.iterdir())).sites[SITE].has_masks
    again = run(store=PlanStore([], tmp_path), seed=1, sigmas=LONG)
    assert again.finish().plan_source == "plan found" and again.finish().sites_routed == 1
    assert not torch.equal(again.masks[1][0], masks[0])


@pytest.mark.parametrize("fails_in", [2, 3])
def test_nothing_stays_of_an_attempt_that_fails(fails_in):
    """Masks, bias and error of a site that saw what is not finite in the step that measures them, and in the one
    that follows, where what was measured before stays."""
    runs = []
    for fails in (False, True):
        policy = Policy(IDENTITY, recipe_for("wan"), Settings(preset="custom", density=0.3, dense_steps=1))
        session = Session(policy, sigmas=SIGMAS)
        generator = torch.Generator().manual_seed(0)
        for step, sigma in enumerate(SIGMAS[:4]):
            q, k, v = torch.randn(3, 1, 4, LAYOUT.length, 32, generator=generator)
            # A site at fault in the first attempt, and with it what comes after.
            for again in (False, True) if fails and step == fails_in else (True,):
                attempt = session.attempt(can_redo=True)
                evaluation = session.begin(layout=LAYOUT, sigma=sigma, attempt=attempt)
                bad = v if again else v * torch.nan
                evaluation.attend(Site("block", 1), q, k, bad, dense=lambda v=v: v.clone(), blocks=2)
                evaluation.attend(SITE, q if again else q * torch.nan, k, bad, dense=lambda v=v: v.clone(), blocks=2)
                assert evaluation.end(0) is not again
                session.log.off_sites.clear()
        runs.append(session)
    clean, redone = runs
    key = (SITE, LAYOUT.grid)
    masks = [{key[0]: its.mask for key, its in session.patterns._patterns.items()}[SITE] for session in runs]
    assert torch.equal(*masks) and masks[0].any(2).all()
    assert torch.equal(clean.refresh.bias(key), redone.refresh.bias(key))
    assert clean.refresh.error == redone.refresh.error and clean.refresh.error[0] > 0


def test_calls_of_one_step_share_the_masks():
    session = run(calls=2, sigmas=LONG)
    assert all(torch.equal(*pair) for pair in session.masks.values())


def test_without_room_for_patterns_masks_are_measured_every_time(monkeypatch):
    monkeypatch.setattr("comfyui_paro.paro_runtime.attention.patterns.CACHE_BYTES", 0)
    measured = []
    monkeypatch.setattr(evaluation_module, "routed_bits", lambda *a, **k: measured.append(1) or routed_bits(*a, **k))
    report = run(sigmas=LONG).finish()
    assert len(measured) == 8 and report.calls == {"sparse": 8, "dense step": 1}


def test_all_that_is_measured_knows_of_the_calls_scale_and_mask(monkeypatch):
    bias, seen = torch.zeros(1, LAYOUT.length), {}

    def watch(where, name):
        real = getattr(where, name)

        def watched(*args, **kwargs):
            told = next((vars(each) for each in args if isinstance(each, ScoreInputs)), kwargs)
            seen.setdefault(name, []).append((told["scale"], told["key_bias"] is bias))
            return real(*args, **kwargs)

        monkeypatch.setattr(where, name, watched)

    watch(Calibrator, "observe")
    watch(TailBiasUpdate, "measure")
    watch(evaluation_module, "routed_bits")
    watch(evaluation_module, "run_kernel")
    session = Session(
        Policy(IDENTITY, recipe_for("wan"), Settings("custom", density=0.3, dense_steps=1)), sigmas=SIGMAS
    )
    for sigma in SIGMAS[:-1]:
        q, k, v = torch.randn(3, 1, 4, LAYOUT.length, 32)
        call = {"scale": 0.25, "key_bias": bias, "dense": v.clone, "blocks": 1}
        session.begin(layout=LAYOUT, sigma=sigma).attend(SITE, q, k, v, **call)
    assert session.finish().calls["sparse"] == 4
    assert set(seen) == {"observe", "measure", "routed_bits", "run_kernel"}
    assert {each for name in seen for each in seen[name]} == {(0.25, True)}


@pytest.mark.parametrize("short, measured", [(False, [1, 4, 6]), (True, [1])])
def test_what_goes_by_the_masks_is_measured_with_them(monkeypatch, short, measured):
    """In the step that measures the masks of a group; of calls that are short on a GPU only in the first."""
    monkeypatch.setattr(evaluation_module, "is_short", lambda q: short)
    biases, measure = [], TailBiasUpdate.measure

    def watched_measure(self, key, step, scores, v, pattern, backend):
        biases.append((step, pattern.mask))
        return measure(self, key, step, scores, v, pattern, backend)

    monkeypatch.setattr(TailBiasUpdate, "measure", watched_measure)
    session = run(sigmas=LONG)
    assert [step for step, _ in biases] == measured
    assert all(torch.equal(mask, session.masks[step][0]) for step, mask in biases)


def test_one_site_of_a_layout_is_made_anew():
    entry = SitePlan.create(("FHW",) * 4, torch.rand(4, 6, 6) < 0.4, torch.zeros(4), torch.ones(4))
    other = Site("block", 1)
    plan, cache = Plan(IDENTITY, LAYOUT, 64, {SITE: entry, other: entry}), PatternCache()

    def words(site):
        return cache.get(site, plan, 0, LAYOUT, 4, torch.device("cpu")).kept_words

    first, second = words(SITE), words(other)
    cache.drop(SITE, LAYOUT)
    fresh = words(SITE)
    assert fresh is not first and torch.equal(fresh, first)
    assert words(SITE) is fresh and words(other) is second and len(cache) == 2


@pytest.mark.parametrize(
    "more",
    [
        {"dense_steps": 2},  # saw more than noise
        {"method": Method(criterion="mass")},
        {"method": Method(criterion="error")},
        {"method": Method(masks="plan")},
        {"highest_noise": 2.0},  # began with a picture
    ],
)
def test_other_runs_of_small_grids_have_masks_in_their_plan(more):
    session = run(**more)
    assert session._grids[LAYOUT.grid].plan.sites[SITE].has_masks
    assert session.finish().sites_routed == 0


def test_large_grids_have_none_in_theirs(monkeypatch):
    monkeypatch.setattr("comfyui_paro.paro_runtime.calibration.options.is_large", lambda tokens: tokens > 300)
    for dense_steps in (0, 1, 2):
        session = run(dense_steps=dense_steps, sigmas=LONG)
        plan = session._grids[LAYOUT.grid].plan
        assert plan.made["criterion"] == "mass" and not plan.sites[SITE].has_masks
        report = session.finish()
        assert report.sites_routed == 1 and report.calls["sparse"] == 9 - dense_steps
    calibrator = Calibrator(IDENTITY, mask_options(Settings(density=0.3), recipe_for("wan")))
    q, k, v = torch.randn(3, 1, 4, LAYOUT.length, 32)
    calibrator.observe(SITE, LAYOUT, q, k, v)
    assert not calibrator.plan({}).sites[SITE].has_masks


def test_a_given_plan_with_masks_is_followed():
    masks = torch.rand(1, 4, 6, 6) < 0.4
    entry = SitePlan.create(("FHW",) * 4, masks[0] | torch.eye(6, dtype=torch.bool), torch.zeros(4), torch.ones(4))
    session = run(plan=Plan(IDENTITY, LAYOUT, 64, {SITE: entry}, made={"by": "PARO Calibrate"}))
    assert all(torch.equal(mask, entry.mask()) for its in session.masks.values() for mask in its)
    assert session.finish().sites_routed == 0


def test_trouble_ends_in_the_hosts_attention(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(routing_module, "mean_query_masses", broken)
    report = run().finish()
    assert report.sites_sparse == 0 and report.calls == {"sparse": 0, "dense step": 1}
    assert report.fallbacks == [("block.0.0: RuntimeError: no such kernel", 4)]
    with pytest.raises(RuntimeError, match="no such kernel"):
        run(settings={"strict": True})


def test_query_heads_go_by_the_order_of_their_key_head():
    names = ("HWF", "HWF", "WFH", "WFH")
    entry = SitePlan.create(names, torch.ones(4, 6, 6, dtype=torch.bool), torch.zeros(4), torch.ones(4))
    sizes = {"block_q": 64, "pool": 64, "expansions": 16, "kv_heads": 2, "device": torch.device("cpu")}
    found = pattern_of(entry, LAYOUT, group=0, **sizes).tables_of_heads(4)
    assert torch.equal(found, torch.stack([order_table(name, LAYOUT.grid) for name in names]))
