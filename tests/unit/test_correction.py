"""Corrections by mean queries within a run: which heads take them, when they are measured, what trouble does."""

from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.api import sparse_attention
from comfyui_paro.kernels.problem import Geometry, Precision, SparsePattern
from comfyui_paro.paro_runtime import correction as correction_module
from comfyui_paro.paro_runtime.correction import QueryCorrection, best_shares, exact_rows, rows_per_mean_query
from comfyui_paro.paro_runtime.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.recipes import recipe_for
from comfyui_paro.paro_runtime.session import Policy, Session
from comfyui_paro.paro_runtime.settings import Settings
from comfyui_paro.paro_runtime.tokens import TokenLayout
from comfyui_paro.paro_runtime.verdict import exact
from torch.nn.functional import scaled_dot_product_attention as sdpa

EXACT = Precision("16", "16")
GEOMETRY = Geometry(3, (5, 8, 9), 2)
LAYOUT = TokenLayout(3, (5, 8, 9), 2)
# Of the grid's tokens, -1 to 1 along each axis.
PLACES = torch.cartesian_prod(*(torch.linspace(-1, 1, size) for size in LAYOUT.grid))
SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


# The head whose queries are alike in each block: of the second key head, so that heads cannot be mixed up unseen.
ALIKE = 2


def problem(batch=1, heads=4, kv_heads=2, dim=32, block_q=64, rows=8):
    """Head ALIKE has the same query for so many rows each; the queries of the other heads have nothing in common."""
    g = replace(GEOMETRY, block_q=block_q)
    q, k, v = (torch.randn(batch, n, g.length, dim) for n in (heads, kv_heads, kv_heads))
    v[..., 0] += torch.linspace(0, 3, g.length)
    tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(kv_heads)]).int()
    its = tables[ALIKE // (heads // kv_heads)].long() + g.prefix
    for start in range(0, g.grid_tokens, rows):
        q[:, ALIKE, its[start : start + rows]] = q[:, ALIKE, its[start : start + 1]]
    mask = torch.rand(heads, g.q_blocks, g.k_blocks) < 0.4
    mask[:, :, 0] = True
    mask[:, :, -1] = False
    return q, k, v, SparsePattern.from_mask(g, tables, torch.arange(kv_heads).int(), mask, torch.zeros(heads), 64, 2)


def dense_of(q, k, v, bias=None):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return sdpa(q, k, v, attn_mask=None if bias is None else bias[:, None, None])


@pytest.mark.parametrize("biased", [False, True])
def test_exact_rows_are_those_of_dense_attention(biased):
    q, k, v, _ = problem(batch=2)
    bias = torch.randn(2, GEOMETRY.length) if biased else None
    rows = torch.stack([torch.randperm(GEOMETRY.length)[:50] for _ in range(4)])
    found = exact_rows(q, k, v, rows, scale=None, key_bias=bias)
    expected = dense_of(q, k, v, bias).gather(2, rows[None, :, :, None].expand(2, -1, -1, 32))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_shares_are_least_squares_between_nothing_and_all():
    error, part = torch.randn(2, 1000)
    for factor, expected in ((0.6, 0.6), (3.0, 1.0), (-0.5, 0.0), (0.0, 0.0)):
        # What is missed is `factor` times the correction, and something that has nothing to do with it.
        rest = 0.1 * (error - (error @ part) / (part @ part) * part)
        missed = factor * part + rest
        sums = torch.stack([missed @ missed, missed @ part, part @ part])[:, None]
        assert best_shares(sums).item() == pytest.approx(expected, abs=1e-5)
    # Too little is gained: a tenth of the squared error.
    assert best_shares(torch.tensor([[1.0], [0.1], [0.1]])).item() == 0
    assert best_shares(torch.zeros(3, 2)).tolist() == [0, 0]


@pytest.mark.parametrize(
    "tokens, rows", [(512, 8), (2048, 8), (2049, 16), (4096, 16), (8192, 16), (8193, 128), (75600, 128)]
)
def test_small_grids_have_a_mean_query_for_fewer_rows(tokens, rows):
    assert rows_per_mean_query(Geometry(5, (1, 1, tokens), 0, block_q=128)) == rows


@pytest.mark.parametrize("block_q, rows", [(64, 8), (128, 16), (64, 64), (128, 128)])
def test_only_heads_whose_rows_have_something_in_common_are_corrected(block_q, rows, monkeypatch):
    monkeypatch.setattr(correction_module, "FINE_ROWS", ((2048, rows),) if rows < 64 else ())
    q, k, v, pattern = problem(block_q=block_q, rows=rows)
    dense, out = dense_of(q, k, v), sparse_attention(q, k, v, pattern, EXACT)
    before, correction = out.clone(), QueryCorrection()
    call = (q, k, v, out, pattern)
    correction.apply("site", 0, 3, True, *call, scale=None, key_bias=None)
    missed = [(x - dense)[:, :, 3:-2].square().sum((0, 2, 3)) for x in (before, out)]
    others = [head for head in range(4) if head != ALIKE]
    assert missed[1][ALIKE] < 1e-6 * missed[0][ALIKE]
    assert torch.equal(out[:, others], before[:, others]) and correction.heads == (1, 4)
    # The next step adds the same, whatever its own queries miss. A site or a call that was never measured is left
    # alone, and so is one of another batch, and all of them once the masks are others.
    rest = {"scale": None, "key_bias": None}
    again = before.clone()
    correction.apply("site", 0, 4, False, *torch.randn(2, *q.shape), v, again, pattern, **rest)
    torch.testing.assert_close(again, out)
    for key, call in (("other", 0), ("site", 1)):
        correction.apply(key, call, 4, False, q, k, v, again := before.clone(), pattern, **rest)
        assert torch.equal(again, before)
    twice = [x.repeat(2, 1, 1, 1) for x in (q, k, v, before)]
    correction.apply("site", 0, 4, False, *twice, pattern, **rest)
    assert torch.equal(twice[3][:1], before)
    correction.apply("site", 1, 4, True, q, k, v, before.clone(), pattern, **rest)
    correction.forget()
    assert correction.heads == (0, 0)
    # One call's corrections are made anew: the other's are not those from before.
    correction.apply("site", 0, 5, True, q, k, v, again := before.clone(), pattern, **rest)
    correction.apply("site", 1, 5, False, q, k, v, other := before.clone(), pattern, **rest)
    torch.testing.assert_close(again, out)
    assert torch.equal(other, before)


def test_each_call_of_a_step_has_corrections_of_its_own():
    both = [problem() for _ in range(2)]
    correction, rest = QueryCorrection(), {"scale": None, "key_bias": None}
    results = []
    for call, (q, k, v, pattern) in enumerate(both):
        out = sparse_attention(q, k, v, pattern, EXACT)
        correction.apply("site", call, 3, True, q, k, v, out, pattern, **rest)
        results.append(out)
    for call, (q, k, v, pattern) in enumerate(both):
        out = sparse_attention(q, k, v, pattern, EXACT)
        correction.apply("site", call, 4, False, q, k, v, out, pattern, **rest)
        # The shares are of both calls by now.
        assert (out - results[call])[:, ALIKE].norm() < 1e-3 * (out - dense_of(q, k, v))[:, 1].norm()


def test_corrections_beyond_what_may_be_kept_are_added_once(monkeypatch):
    q, k, v, pattern = problem(batch=2)
    before, rest = sparse_attention(q, k, v, pattern, EXACT), {"scale": None, "key_bias": None}
    size = 2 * 46 * 32 * 4  # entries, mean queries of 8 of the 360 rows (one more for none), channels, bytes
    for most, kept in ((size * 45 // 46, True), (size * 45 // 46 - 1, False)):
        monkeypatch.setattr(correction_module, "cache_bytes", lambda device, most=most: most)
        correction = QueryCorrection()
        correction.apply("site", 0, 3, True, q, k, v, first := before.clone(), pattern, **rest)
        correction.apply("site", 0, 4, False, q, k, v, second := before.clone(), pattern, **rest)
        assert not torch.equal(first, before)
        assert torch.equal(second, first if kept else before)
        # Made anew in the next group, they take the place of the old ones.
        q2, k2, v2, pattern2 = problem(batch=2)
        before2 = sparse_attention(q2, k2, v2, pattern2, EXACT)
        correction.apply("site", 0, 5, True, q2, k2, v2, third := before2.clone(), pattern2, **rest)
        correction.apply("site", 0, 6, False, q2, k2, v2, fourth := before2.clone(), pattern2, **rest)
        assert not torch.equal(third, before2) and torch.equal(fourth, third if kept else before2)


def test_calls_of_one_step_add_up():
    one, two = problem(), problem()
    together = QueryCorrection()
    for q, k, v, pattern in (one, two):
        out = sparse_attention(q, k, v, pattern, EXACT)
        together.apply("site", 0, 3, True, q, k, v, out, pattern, scale=None, key_bias=None)
    apart = [QueryCorrection(), QueryCorrection()]
    for correction, (q, k, v, pattern) in zip(apart, (one, two), strict=True):
        out = sparse_attention(q, k, v, pattern, EXACT)
        correction.apply("site", 0, 3, True, q, k, v, out, pattern, scale=None, key_bias=None)
    sums = [correction._fits["site"].sums for correction in apart]
    torch.testing.assert_close(together._fits["site"].sums, sums[0] + sums[1])
    # A later step begins anew.
    q, k, v, pattern = two
    together.apply(
        "site", 0, 4, True, q, k, v, sparse_attention(q, k, v, pattern, EXACT), pattern, scale=None, key_bias=None
    )
    torch.testing.assert_close(together._fits["site"].sums, sums[1])


def test_an_error_that_corrections_take_away_is_none():
    correction = QueryCorrection()
    assert correction.error is None
    q, k, v, pattern = problem()
    out = sparse_attention(q, k, v, pattern, EXACT)
    correction.apply("site", 0, 3, True, q, k, v, out, pattern, scale=None, key_bias=None)
    assert 0 < correction.error[0] == correction.error[1] < 1
    ((at, sums),) = correction._wrong.items()
    correction._wrong[at] = torch.stack([torch.full_like(sums[0], -1e-9), torch.zeros_like(sums[1])])
    assert correction.error == (0, 0)


def run(dense_steps, conditionings=((0,),), **more):
    """A run of one site whose heads look at wide places that move with the row; the session, and the error of every
    sparse step."""
    settings = Settings(
        preset="custom", density=0.3, precision="16bit", dense_steps=dense_steps, **more.pop("settings", {})
    )
    policy = Policy(ModelIdentity("wan", "a" * 16, "b" * 16), recipe_for("wan"), settings)
    session = Session(policy, sigmas=SIGMAS, **more)
    generator = torch.Generator().manual_seed(0)
    errors = []
    first = torch.randn(3, 1, 4, LAYOUT.length, 32, generator=generator)
    first[0] *= 0.3
    first[0, :, :, 3:-2] += 0.5 * PLACES @ torch.randn(1, 4, 3, 32, generator=generator)
    for sigma in SIGMAS[:-1]:
        # Steps follow each other closely.
        q, k, v = first + 0.05 * torch.randn(first.shape, generator=generator)
        dense = sdpa(q, k, v)
        for its in conditionings:
            evaluation = session.begin(layout=LAYOUT, sigma=sigma, conditionings=its)
            out = evaluation.attend(Site("block", 0), q, k, v, dense=lambda d=dense: d.clone(), blocks=1)
            evaluation.end()
            if not torch.equal(out, dense):
                errors.append(((out - dense).norm() / dense.norm()).item())
    return session, errors


@pytest.mark.parametrize("dense_steps, correct", [(1, True), (3, True), (1, False), (3, False)])
def test_a_run_is_corrected(dense_steps, correct):
    session, errors = run(dense_steps, correct=correct)
    _, without = run(dense_steps, correct=False)
    assert len(errors) == len(without) == 5 - dense_steps
    report = session.finish()
    assert (report.heads_corrected > 0) == correct
    assert (f"{report.heads_corrected} heads given back, on average," in report.text()) == correct
    assert not report.fallbacks and not report.notes
    if correct:
        assert all(a < 0.9 * b for a, b in zip(errors, without, strict=True))
        # What the run says of itself, from a fifth of the rows here, is what it did.
        whole, worst = report.attention_error
        assert 0.85 * min(errors) < whole < 1.15 * max(errors) and whole <= worst < 2 * whole
        assert f"attention error {exact(whole)}, in the worst layer {exact(worst)}" in report.text()
    else:
        assert errors == without and report.attention_error is None
        assert "attention error: not measured" in report.text()


def test_with_little_room_each_call_keeps_the_heads_of_its_own_shares(monkeypatch):
    """Then they are reduced in the very step that made them, before the shares are of both calls."""
    both, rest = [problem(), problem()], {"scale": None, "key_bias": None}
    shares = iter([torch.tensor([0.0, 0.0, 0.0, 0.5]), torch.tensor([0.5, 0.0, 0.0, 0.0])])
    monkeypatch.setattr(correction_module, "best_shares", lambda sums: next(shares))
    taken = 45 * 32 * 4  # by a head: mean queries, channels, bytes
    monkeypatch.setattr(correction_module, "cache_bytes", lambda device: 3 * taken)
    correction = QueryCorrection()
    for step, due in ((3, True), (4, False), (5, False)):
        for call, (q, k, v, pattern) in enumerate(both):
            out = sparse_attention(q, k, v, pattern, EXACT)
            before = out.clone()
            correction.apply("site", call, step, due, q, k, v, out, pattern, **rest)
            changed = [not torch.equal(out[:, head], before[:, head]) for head in range(4)]
            # In later steps the shares are the second call's: what the first has corrections of has none any more.
            expected = [False, False, False, True] if due and call == 0 else [call == 1, False, False, False]
            assert changed == expected, (step, call)


def test_what_has_no_share_may_be_anything(monkeypatch):
    q, k, v, pattern = problem()
    real = correction_module.query_corrections

    def spoilt(*arguments, **options):
        made = real(*arguments, **options)
        made[:, 0] = torch.inf
        return made

    monkeypatch.setattr(correction_module, "query_corrections", spoilt)
    monkeypatch.setattr(correction_module, "best_shares", lambda sums: torch.tensor([0.0, 0.5, 0.5, 0.5]))
    before, flag = sparse_attention(q, k, v, pattern, EXACT), torch.zeros(4, dtype=torch.int32)
    out = before.clone()
    QueryCorrection().apply(
        "site", 0, 3, True, q, k, v, out, pattern, scale=None, key_bias=None, nonfinite=flag, backend="reference"
    )
    assert torch.equal(out[:, 0], before[:, 0]) and torch.isfinite(out).all() and not flag.any()


def test_evaluations_of_a_step_are_told_apart_by_their_conditionings_and_their_turn():
    policy = Policy(ModelIdentity("wan", "a" * 16, "b" * 16), recipe_for("wan"), Settings(preset="custom", density=0.3))
    session = Session(policy, sigmas=SIGMAS)

    def calls(sigma, *evaluations):
        common = {"layout": LAYOUT, "sigma": sigma}
        return [session.begin(**common, conditionings=its, again=again).call for its, again in evaluations]

    one, other = (0,), (1, 0)
    first = calls(1.0, (one, False), (other, False), (one, False))
    assert len(set(first)) == 3
    # In the next step the same ones again, in any order of the conditionings; one that is run once more is itself.
    assert calls(0.8, (other, False), (other, True), (one, False), (one, False), (one, True)) == [
        first[1],
        first[1],
        first[0],
        first[2],
        first[2],
    ]


def test_conditionings_that_run_apart_keep_their_corrections_apart(monkeypatch):
    seen = []
    real = QueryCorrection.apply

    def watched(self, key, call, step, due, *rest, **more):
        seen.append((key, call, step, due))
        return real(self, key, call, step, due, *rest, **more)

    monkeypatch.setattr(QueryCorrection, "apply", watched)
    run(1, conditionings=((0,), (1,)))
    key = (Site("block", 0), LAYOUT.grid)
    # The four sparse steps fall into three groups, of which the second has two.
    due = {1: True, 2: True, 3: False, 4: True}
    assert seen == [(key, ((one,), 1), step, due[step]) for step in due for one in (0, 1)]


def test_without_a_tail_or_a_measured_bias_nothing_is_corrected():
    for more in ({"settings": {"tail": "off"}}, {"refresh": False}):
        session, errors = run(1, correct=True, **more)
        assert errors and session.finish().heads_corrected == 0


def test_what_the_kernel_does_not_serve_is_left_alone_beside_the_kernel():
    q, _, _, pattern = problem()
    correction = QueryCorrection()
    wide = torch.zeros(1, 4, 1, 256, dtype=torch.float16)
    assert correction.suits(q, pattern, "reference") and correction.suits(wide, pattern, "reference")
    assert correction.suits(q.half(), pattern, "triton")
    assert not correction.suits(q, pattern, "triton") and not correction.suits(wide, pattern, "triton")
    for change in ({"kept_words": None}, {"tail_bias": None}, {"pool": 16}):
        assert not correction.suits(q, replace(pattern, **change), "reference")


def test_a_correction_that_is_not_finite_is_noticed(monkeypatch):
    real = correction_module.add_corrections

    def spoilt(out, *arguments, **options):
        out[0, 0, 5, 0] = torch.inf
        return real(out, *arguments, **options)

    monkeypatch.setattr(correction_module, "add_corrections", spoilt)
    session, errors = run(2)
    assert errors == [] and session.off_sites == {Site("block", 0): "block.0.0: the result is not finite"}


def test_trouble_ends_the_corrections_and_not_the_run(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(correction_module, "query_corrections", broken)
    session, errors = run(1)
    _, without = run(1, correct=False)
    report = session.finish()
    assert errors == without and report.sites_sparse == 1 and not report.fallbacks
    assert report.notes == ["correction by mean queries is off: RuntimeError: no such kernel"]
    with pytest.raises(RuntimeError, match="no such kernel"):
        run(1, settings={"strict": True})


def test_what_no_later_step_wants_is_not_kept(monkeypatch):
    """Of 720p and 40 layers it is 0.2 GB."""
    kept, real = [], QueryCorrection._carry

    def watched(self, where, carried):
        kept.append(len(steps))
        return real(self, where, carried)

    steps, apply = set(), QueryCorrection.apply

    def applied(self, key, call, step, *rest, **more):
        steps.add(step)
        return apply(self, key, call, step, *rest, **more)

    monkeypatch.setattr(QueryCorrection, "_carry", watched)
    monkeypatch.setattr(QueryCorrection, "apply", applied)
    run(1)
    # Of the three groups of the four sparse steps only the second has two.
    assert steps == {1, 2, 3, 4} and kept == [2, 3]
