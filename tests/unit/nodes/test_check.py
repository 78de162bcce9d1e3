"""A check without a GPU: what is measured is right, what cannot be is told, and the text says what was found."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfyui_paro.kernels.core import support
from comfyui_paro.kernels.core.dispatch import Served
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.kernels.core.scratch import ScratchOutOfMemory
from comfyui_paro.nodes.check import chart, machine, methods
from comfyui_paro.nodes.check import check as check_module
from comfyui_paro.nodes.check import measure as check_measure
from comfyui_paro.nodes.check.check import Check, Kernels, Outlook, check_kernels, outlook
from comfyui_paro.nodes.check.measure import Method, Row, Size, measure, paro_methods, random_pattern
from comfyui_paro.nodes.check.text import check_text, check_verdict, row_text, steps_line
from comfyui_paro.paro_runtime.compiling.readiness import COMPILING
from comfyui_paro.paro_runtime.config.recipes import mask_options, recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session

CPU = torch.device("cpu")
SIZE = Size(TokenLayout(7, (3, 8, 10), 2), 3, 32, torch.float32)
OPTIONS = mask_options(Settings(), recipe_for("wan"))
SDPA = torch.nn.functional.scaled_dot_product_attention
PLAIN = Method("plain", "host", lambda q, k, v: lambda: SDPA(q, k, v))


def rows_of(*methods: Method, free: float | None = None, size: Size = SIZE) -> list[Row]:
    return list(measure(list(methods), size, CPU, free, lambda name: None))


def failing(error: Exception) -> Method:
    def make(q, k, v):
        def run():
            raise error

        return run

    return Method("failing", "other", make)


def test_errors_are_those_of_the_methods():
    """Exact attention errs by rounding, a method that is off by a tenth by a tenth, INT8 by what INT8 does."""
    off = Method("off", "other", lambda q, k, v: lambda: SDPA(q, k, v) * 1.1)
    exact, wrong, dense, sparse = rows_of(PLAIN, off, *paro_methods(SIZE, "int8", OPTIONS, 0.5, "reference"))
    assert all(row.ms > 0 and row.heads == 3 and not row.reason for row in (exact, wrong, dense, sparse))
    assert exact.error < 1e-5
    assert wrong.error == pytest.approx(0.1, rel=1e-3)
    assert 1e-4 < dense.error < 3e-2 < sparse.error
    assert (dense.density, sparse.density) == (1.0, 0.5) and "50 % of blocks" in sparse.name


def test_a_head_of_its_own_is_compared_with_itself():
    """Both sampled heads count: one that is wrong in the last head alone is found."""

    def make(q, k, v):
        def run():
            out = SDPA(q, k, v)
            out[:, -1] = 0
            return out

        return run

    (row,) = rows_of(Method("half", "other", make))
    assert 0.5 < row.error < 0.9


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (methods.Unavailable("it is not here"), "it is not here"),
        (RuntimeError("no kernel\nfor this"), "RuntimeError: no kernel"),
        (torch.OutOfMemoryError("CUDA out of memory"), "there is not enough free memory"),
        (ScratchOutOfMemory("scratch"), "there is not enough free memory"),
    ],
)
def test_what_fails_is_told_and_the_rest_is_measured(error, reason):
    failed, after = rows_of(failing(error), PLAIN)
    assert failed.ms is None and failed.error is None and failed.reason == reason
    assert after.ms > 0


def test_a_result_of_another_shape_is_none():
    (row,) = rows_of(Method("flat", "other", lambda q, k, v: lambda: q.flatten(2)))
    assert row.ms is None and row.reason.startswith("the result is [1, 3, ")


def test_memory_and_work_decide_how_many_heads_are_measured():
    large = Size(TokenLayout(0, (21, 45, 80)), 40, 128, torch.bfloat16)
    assert 1 <= large.heads_measured(None) < 40
    one_head = check_measure.TENSORS_OF_A_CALL * large.layout.length * 128 * 2 / check_measure.SHARE_OF_MEMORY
    assert large.heads_measured(2.5 * one_head) == 2 and large.heads_measured(0.9 * one_head) == 0
    none, too = rows_of(PLAIN, PLAIN, free=1000.0)
    assert none.reason == too.reason == "there is not enough free memory for one head"
    one = Size(SIZE.layout, 3, 32, torch.float32).heads_measured(None)
    assert one == 3


def test_times_are_scaled_to_all_heads(monkeypatch):
    monkeypatch.setattr(check_measure, "_milliseconds", lambda run, device, between: 2.0)
    monkeypatch.setattr(check_measure, "MOST_WORK", 4 * SIZE.layout.length**2 * SIZE.head_dim)
    (row,) = rows_of(PLAIN)
    assert (row.heads, row.ms) == (1, 6.0)


def test_time_is_bounded(monkeypatch):
    monkeypatch.setattr(check_measure, "MOST_SECONDS", -1.0)
    (row,) = rows_of(PLAIN)
    assert row.ms is None and row.reason.startswith("left out, the others took ")


def test_it_can_be_stopped_between_runs():
    seen = []

    def between(name):
        seen.append(name)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([PLAIN, PLAIN], SIZE, CPU, None, between)
    assert seen == ["plain"] * 3


@pytest.mark.parametrize("pool", [None, 64])
def test_random_masks_have_the_density_asked(pool):
    pattern = random_pattern(TokenLayout(0, (8, 20, 32)), 4, 0.3, pool, CPU)
    assert (pattern.mask.sum(2) == 24).all() and (pattern.tail_bias is None) == (pool is None)


def test_methods_that_are_not_here_say_what_is_missing(monkeypatch):
    q = torch.zeros(1, 1, 64, 64)
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(methods.Unavailable, match=r"^sageattention is not installed$"):
        methods.sage(q, q, q)
    monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(sol_attn=print))
    with pytest.raises(methods.Unavailable, match="has no int8_attention"):
        methods.kitchen_int8(q, q, q)
    with pytest.raises(methods.Unavailable, match="heads of 128 channels, these have 64"):
        methods.kitchen_sol(0.3)(q, q, q)


def test_block_sparse_attention_of_others_gets_its_own_layout(monkeypatch):
    """It wants `[B, L, H, D]` and a share of the keys."""
    asked = []

    def sol_attn(q, k, v, *, topk_ratio):
        asked.append((tuple(q.shape), topk_ratio))
        return SDPA(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(sol_attn=sol_attn))
    size = Size(SIZE.layout, 2, 128, torch.float32)
    (row,) = rows_of(Method("sol", "other", methods.kitchen_sol(0.3), 0.3), size=size)
    assert asked[0] == ((1, SIZE.layout.length, 2, 128), 0.3) and row.error < 1e-5


def session(steps: int = 10, **settings) -> Session:
    policy = Policy(ModelIdentity("wan", "a", "w"), recipe_for("wan"), Settings(**settings))
    return Session(policy, sigmas=[1 - step / steps for step in range(steps + 1)])


def served(its: Session) -> Session:
    """As on a GPU that serves every call."""
    its.unsuitable_reason = lambda tokens, q: None
    its.backend = "triton"
    return its


@pytest.mark.parametrize(("grid", "steps", "dense", "density"), [((3, 8, 10), 8, 2, 0.55), ((21, 30, 52), 8, 1, 0.2)])
def test_the_outlook_is_what_a_session_does(grid, steps, dense, density):
    its = session(steps, backend="triton", preset="fast")
    found = outlook(served(its), replace(SIZE, layout=TokenLayout(0, grid)), CPU, 30)
    begun = session(steps, backend="triton", preset="fast")
    begun.begin(layout=TokenLayout(0, grid), sigma=1.0)
    assert found.dense == tuple(begun.schedule.is_dense_step(step) for step in range(steps))
    assert sum(found.dense) == dense and len(found.densities) == steps - dense and found.sites == 30
    assert sorted(set(found.densities), reverse=True) == list(its.options.densities(density))
    assert found.density == pytest.approx(density, abs=0.02)


def test_the_gain_of_a_run_counts_its_dense_steps():
    found = outlook(served(session(10, min_tokens=0, density=0.3, preset="custom")), SIZE, CPU, None)
    assert not found.why_not and found.gain == recipe_for("wan").expected_gain(SIZE.layout, found.density)
    found = replace(found, gain=(1.0, 2.0))
    assert found.run_gain == (1.0, 10 / (2 + 8 / 2))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dense_steps": 20, "density": 0.3, "preset": "custom"}, "dense step"),
        ({"min_tokens": 100_000}, "240 grid tokens, below the minimum of 100000"),
    ],
)
def test_why_no_step_would_be_sparse(settings, reason):
    its = session(10, **settings)
    if "min_tokens" not in settings:
        its = served(its)
    found = outlook(its, SIZE, CPU, None)
    assert found.why_not == reason and found.gain is None and found.run_gain is None


def test_on_a_cpu_the_reason_is_the_cpu(monkeypatch):
    for module in (check_module, support):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    reason = "triton does not run on cpu"
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: object())
    assert outlook(session(10), SIZE, CPU, None).why_not == reason
    kernels = check_kernels(SIZE, CPU, "int8", OPTIONS, lambda: None)
    assert not kernels.ready and kernels.reason == reason


class Compiling:
    """In the place of Readiness: what it answers in one step after another, and from when on late kernels are there."""

    def __init__(self, answers, late_from):
        self.answers, self.late_from, self.steps = answers, late_from, []

    def __call__(self, options, compile_ahead):
        assert compile_ahead
        return self

    def reason(self, q, k, layout, step, **call):
        self.steps.append(step)
        return self.answers[min(step, len(self.answers) - 1)]

    @property
    def late_ready(self):
        return len(self.steps) > self.late_from


@pytest.fixture
def kernels(monkeypatch):
    """`check_kernels` as on a GPU, whose kernels become ready as the answers say, and how often it asked."""
    monkeypatch.setattr(check_module, "interpreted", lambda: True)
    monkeypatch.setattr(check_module, "resolve", lambda *call: Served("triton", {}))
    monkeypatch.setattr(check_module, "POLL_SECONDS", 0)

    def run(answers, late_from=0, seconds=1000.0, between=lambda: None):
        compiling = Compiling(answers, late_from)
        monkeypatch.setattr(check_module, "WAIT_SECONDS", seconds)
        monkeypatch.setattr(check_module, "Readiness", compiling)
        return check_kernels(SIZE, CPU, "int8", OPTIONS, between), len(compiling.steps)

    return run


def test_compiling_is_waited_for(kernels):
    found, asked = kernels([COMPILING, COMPILING, None])
    assert (found.ready, found.reason, found.note, asked) == (True, "", "", 3)
    found, asked = kernels([COMPILING, None], late_from=4)
    assert (found.ready, found.note, asked) == (True, "", 5)
    found, asked = kernels([COMPILING, "self-check: wrong"])
    assert (found.ready, found.reason, asked) == (False, "self-check: wrong", 2)


def test_compiling_is_not_waited_for_without_end(kernels):
    found, _ = kernels([COMPILING], seconds=-1.0)
    assert not found.ready and "check again" in check_verdict(replace(FOUND, kernels=found))
    assert "check again" in check_text(replace(FOUND, kernels=found)).partition("What a run")[0]
    found, _ = kernels([None], late_from=9, seconds=-1.0)
    assert found.ready and "still being compiled" in check_text(replace(FOUND, kernels=found))

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernels([COMPILING], between=stop)


@pytest.mark.skipif(not support.interpreted(), reason="needs TRITON_INTERPRET=1")
def test_paros_kernels_are_measured(monkeypatch):
    monkeypatch.setattr(check_measure, "MOST_SECONDS", float("inf"))  # the interpreter on a busy machine takes as long
    small = Size(TokenLayout(3, (2, 8, 10)), 2, 32, torch.float32)
    for row in rows_of(*paro_methods(small, "int8", OPTIONS, 0.5, "triton"), size=small):
        assert row.ms > 0 and row.error < 1, row
    found = check_kernels(small, CPU, "int8", OPTIONS, lambda: None)
    assert found.ready, found


MACHINE = {
    **machine.machine(CPU),
    "gpu": "NVIDIA H100",
    "memory": 79.2,
    "compute_capability": "9.0",
    "driver": "580.1",
    "comfyui": "0.33.0",
}
RUN = Outlook(
    family="wan",
    title="Wan",
    evidence="none",
    density=0.3,
    precision="fp8",
    dense=(True, True, False, False),
    densities=(0.4, 0.2),
    dense_blocks="",
    sites=30,
    gain=(1.5, 2.4),
)
NOW, OURS = Row("now", "host", 1.0, 10.0, 0.001, 3), Row("PARO", "paro", 0.3, 4.0, 0.5, 3)
MISSING = Row("Sage", "other", 1.0, reason="sageattention is not installed")
FOUND = Check(MACHINE, Kernels(True, "", 2.0), RUN, SIZE, (NOW, OURS, MISSING), ("a: b",), ("a note",))


def test_the_text_says_everything():
    text = check_text(FOUND)
    for line in (
        "PARO would be faster here: 2 of 4 steps sparse, expected 1.5x to 2.4x per sparse step, "
        "attention itself 2.5x as fast as now",
        "- NVIDIA H100, 79.2 GiB, compute capability 9.0, driver 580.1",
        "- PARO's kernels are compiled and pass the self-check (2.0 s)",
        "- 4 steps: the first 2 dense, 2 sparse, keeping 30 % of the blocks (40 % to 20 %)",
        "- 30 attention layers in each sparse step",
        "- now: 10 ms, error 0.1 %",
        "- PARO: 4 ms, 2.50x as fast as now, error 50 %",
        "- not measured, sageattention is not installed: Sage",
        "- a: b",
        "- a note",
    ):
        assert line in text.splitlines(), line
    assert "inputs are random" in text
    assert json.loads(json.dumps(FOUND.as_dict()))["rows"][1]["ms"] == 4.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"kernels": Kernels(False, "triton is not installed")},
            "PARO cannot be used now: triton is not installed; inst",
        ),
        ({"outlook": None}, "PARO can be used on this machine; connect a model"),
        ({"outlook": replace(RUN, why_not="dense step")}, "PARO would gain little or nothing here: steps at the begin"),
        ({"rows": (NOW, replace(OURS, ms=20.0))}, "PARO would not pay here: a sparse attention call takes 2.00x the"),
        ({"rows": (NOW, replace(NOW, ms=2.0), OURS)}, "PARO would not pay here: a sparse attention call takes 2.00x"),
        ({"rows": ()}, "PARO would be faster here: 2 of 4 steps sparse, expected 1.5x to 2.4x per sparse step"),
        ({"kernels": None}, "Not all could be checked"),
    ],
)
def test_the_first_line_says_what_to_do(changes, said):
    assert check_verdict(replace(FOUND, **changes)).startswith(said)
    assert check_text(replace(FOUND, **changes))


def test_times_in_words():
    assert [row_text(replace(NOW, ms=ms), None).split(",")[0] for ms in (0.1234, 12.34, 123.4)] == [
        "0.123 ms",
        "12.3 ms",
        "123 ms",
    ]
    assert row_text(replace(OURS, ms=1234.5), 2469.0) == "1,234 ms, 2.00x as fast as now, error 50 %"


def test_steps_in_words():
    assert steps_line(replace(RUN, dense=(True,), densities=())) == "1 step: all dense"
    assert steps_line(replace(RUN, dense=(True, False), densities=(0.3,))).startswith(
        "2 steps: the first dense, 1 sparse"
    )
    assert steps_line(replace(RUN, dense=(False,), densities=(0.3,))) == "1 step: 1 sparse, keeping 30 % of the blocks"


def test_the_chart_has_bars_as_long_as_the_times():
    picture = chart.check_chart(FOUND)
    assert picture.shape[0] == 1 and picture.shape[2:] == (chart.WIDTH, 3) and 0 <= picture.min() < picture.max() <= 1
    widths = {}
    for kind in ("host", "paro"):
        colour = torch.tensor(chart.COLOURS[kind]) / 255
        same = (picture[0] - colour).abs().amax(2) < 1e-3
        widths[kind] = same[: picture.shape[1] - 80].sum(1).max().item()  # the steps below have the same colours
    assert widths["paro"] / widths["host"] == pytest.approx(0.4, abs=0.01)
    bare = Check(machine.machine(CPU))
    assert chart.check_chart(bare).shape[1] < picture.shape[1]
    many = replace(FOUND, outlook=replace(RUN, dense=(False,) * 2000, densities=(0.3,) * 2000))
    assert chart.check_chart(many).shape == picture.shape


def test_the_driver_is_asked_and_need_not_answer(monkeypatch):
    def gone(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(machine.subprocess, "run", gone)
    assert machine._driver() is None
    assert machine.machine(CPU)["paro"] and machine.machine(CPU)["gpu"] is None
