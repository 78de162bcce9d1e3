"""A run whose kernels are still being compiled stays on the host's attention, and goes over when they are there."""

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.compiling import ahead, readiness
from comfyui_paro.paro_runtime.compiling.readiness import COMPILING
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.options import MaskOptions
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.run import evaluation
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session

LAYOUT = TokenLayout(0, (4, 8, 10))
SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


@pytest.fixture(autouse=True)
def compiling_ahead(monkeypatch):
    monkeypatch.delenv(ahead.SWITCH, raising=False)


class StandIn:
    """What `ahead_of` gives: kernels that are ready from a certain question on."""

    def __init__(self, ready_after: int) -> None:
        self.left = ready_after
        self.asked = 0

    def ready(self) -> bool:
        self.asked += 1
        self.left -= 1
        return self.left < 0

    def late_ready(self) -> bool:
        return self.left < 0


def run(monkeypatch, ready_after: int, **settings):
    """Calls by step: `host`, or `ours` where PARO answered; the session and the stand-in."""
    stand_in = StandIn(ready_after)
    monkeypatch.setattr(readiness, "capability_of_gpu", lambda device: (9, 0))
    monkeypatch.setattr(readiness, "ahead_of", lambda job: stand_in)
    monkeypatch.setattr(readiness, "self_check", lambda *args, **sizes: None)
    monkeypatch.setattr(Session, "_find_unsuitable", lambda self, *key: None)
    monkeypatch.setattr(Session, "too_short_to_drop", lambda self, tokens, device: None)
    chosen = Settings(**{"preset": "custom", "density": 0.4, "dense_steps": 2, **settings})
    session = Session(Policy(ModelIdentity("wan", "a", "w"), recipe_for("wan"), chosen), sigmas=SIGMAS)
    session.log.backend, session.log.precision = "reference", "int8"
    # Only the question whether the kernels are ready is asked as on a GPU: the interpreter would take its time.
    asked = session.readiness.reason
    session.readiness.reason = lambda *call, **rest: asked(*call, **{**rest, "backend": "triton"})
    answered = []
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, LAYOUT.length, 64, generator=generator).half() for _ in range(3))
    for sigma in SIGMAS[:-1]:
        host = []

        def dense(host=host):
            host.append(True)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        evaluation = session.begin(layout=LAYOUT, sigma=sigma)
        for number in range(2):
            evaluation.attend(Site("double", number), q, k, v, dense=dense)
        answered.append("host" if len(host) == 2 else "ours" if not host else "both")
    return answered, session, stand_in


@pytest.mark.parametrize("ready_after, sparse", [(0, 3), (1, 3), (2, 3), (3, 2), (9, 0)])
def test_sparse_steps_begin_when_kernels_are_there(monkeypatch, ready_after, sparse):
    answered, session, _ = run(monkeypatch, ready_after, dense_attention="host")
    assert answered == ["host"] * (5 - sparse) + ["ours"] * sparse
    report = session.finish()
    assert report.calls["sparse"] if sparse else report.sites_sparse == 0
    assert session.log.counts.dense[COMPILING] == 2 * min(ready_after, 5)
    assert not report.fallbacks and not report.passed


def test_a_plan_is_made_of_the_first_step_that_finds_them(monkeypatch):
    """And chosen by what that shows, which is more than noise."""
    _, session, _ = run(monkeypatch, 3, dense_attention="host", dense_steps=1)
    report = session.finish()
    assert (report.plan.made["step"], report.plan.made["criterion"]) == (3, "error")
    assert report.why_dense == COMPILING and "2 of 5 steps sparse" in report.status()


@pytest.mark.parametrize("preset, ours", [("balanced", True), ("fast", True), ("quality", False)])
def test_a_first_step_is_in_8_bits_but_with_the_preset_quality(monkeypatch, preset, ours):
    monkeypatch.setattr(evaluation, "paro_is_faster", lambda q, precision: True)
    policy = Policy(ModelIdentity("wan", "a", "w"), recipe_for("wan"), Settings(preset=preset))
    q = torch.zeros(1, 2, LAYOUT.length, 64)

    def wants(sigma: float, **changes) -> bool:
        return Session(policy, sigmas=SIGMAS, **changes).begin(layout=LAYOUT, sigma=sigma)._wants_dense(q)

    assert wants(1.0) is ours
    # 8 bits in nothing but noise: not in later steps, and not in a run that begins with a picture.
    assert not wants(0.8) and not wants(1.0, highest_noise=1.5)


def test_strict_runs_compile_as_they_go(monkeypatch):
    monkeypatch.setattr(readiness, "ahead_of", lambda job: pytest.fail("started a process"))
    answered, _, stand_in = run(monkeypatch, 9, strict=True, dense_attention="host")
    assert answered == ["host"] * 2 + ["ours"] * 3 and not stand_in.asked


def test_without_a_process_kernels_are_compiled_as_they_come(monkeypatch):
    def refuse(job):
        raise OSError("no more processes")

    monkeypatch.setattr(readiness, "capability_of_gpu", lambda device: (9, 0))
    monkeypatch.setattr(readiness, "self_check", lambda *args, **sizes: None)
    monkeypatch.setattr(readiness, "ahead_of", refuse)
    ready = readiness.Readiness(MaskOptions(0.3, "mass", "shared", 64), compile_ahead=True)
    q = torch.zeros(1, 2, LAYOUT.length, 64)
    call = {"biased": False, "precision": "int8", "backend": "triton"}
    assert ready.reason(q, q, LAYOUT, 0, **call) is None


def test_wrong_kernels_are_a_reason_for_the_whole_run(monkeypatch):
    monkeypatch.setattr(readiness, "self_check", lambda *args, **sizes: "wrong")
    session = Session(
        Policy(ModelIdentity("wan", "a", "w"), recipe_for("wan"), Settings(backend="reference")), sigmas=SIGMAS
    )
    q = torch.randn(1, 2, LAYOUT.length, 64)
    dense = torch.nn.functional.scaled_dot_product_attention
    for sigma in SIGMAS[:-1]:
        evaluation = session.begin(layout=LAYOUT, sigma=sigma)
        out = evaluation.attend(Site("double", 0), q, q, q, dense=lambda: dense(q, q, q))
        assert torch.equal(out, dense(q, q, q))
    assert session.log.counts.passed == {"wrong": 5}
