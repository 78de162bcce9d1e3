"""Trouble of PARO's own: what is not finite, errors of kernels, too little memory."""

import logging
from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.core.dispatch import resolve
from comfyui_paro.kernels.core.precision import PRECISIONS
from comfyui_paro.kernels.core.scratch import ScratchOutOfMemory
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.run import evaluation as evaluation_module
from comfyui_paro.paro_runtime.run.session import Session

from .cases import SIGMAS, SITES, policy, sample, was_dense


def test_a_result_that_is_not_finite_is_redone_dense_and_the_site_stays_dense(caplog):
    def overflow(step, site, q, k, v):
        v = v.clone()
        if step == 3 and site == SITES[1]:
            v[..., 5, :] = torch.nan
        return q, k, v

    session = Session(policy(), sigmas=SIGMAS)
    with caplog.at_level(logging.WARNING, "paro"):
        results = sample(session, change=overflow)
    assert not was_dense(results[2, SITES[1]])
    assert was_dense(results[4, SITES[1]]) and not was_dense(results[4, SITES[2]])
    report = session.finish()
    assert report.fallbacks == [("double.1.0: the result is not finite", 2)]
    assert "not finite" in report.status()
    assert sum("not finite" in r.message for r in caplog.records) == 1  # said once, counted twice


def test_every_call_has_a_flag_of_its_own():
    attempt = Session(policy(), sigmas=SIGMAS).attempt()
    flags = [attempt.flag(torch.device("cpu")).on_device for _ in range(150)]
    assert len({f.data_ptr() for f in flags}) == 150 and not any(f.any() for f in flags)
    assert all(f.data_ptr() % 16 == 0 for f in flags)  # or Triton would compile a second kernel


def attempt_with(session, *raised):
    """An attempt that saw a result of each of some sites: (site, whether its flag is up)."""
    attempt = session.attempt(can_redo=True)
    for site, bad in raised:
        flag = attempt.flag(torch.device("cpu"))
        flag.on_device[0] = bad
        assert attempt.finite(site, flag)  # nobody looks now
    return attempt


def test_results_looked_at_in_the_end_turn_the_first_site_at_fault_dense():
    """The calls of an evaluation are judged together; what is not finite spreads, so the first is at fault."""
    sample(session := Session(policy(), sigmas=SIGMAS))
    attempt = attempt_with(session, *zip(SITES, (0, 1, 1), strict=True))
    assert attempt.end(0) and list(session.log.off_sites) == [SITES[1]]
    assert not attempt.end(1)  # nothing is left to look at
    assert attempt_with(session, (SITES[0], 1), (SITES[2], 1)).end(1) and set(session.log.off_sites) == set(SITES)
    assert not attempt_with(session, (SITES[0], 0)).end(0)
    assert attempt_with(session, (None, 1)).end(0) and session.log.dense_off


def test_nothing_that_a_failed_attempt_counted_stays():
    """Layers that were sparse before it still are; those that it was the first to make sparse are not."""
    session = Session(policy(), sigmas=SIGMAS)
    sound = attempt_with(session, (SITES[0], 0))
    sound.count_sparse(SITES[0])
    assert not sound.end(0)
    failed = attempt_with(session, (SITES[0], 0), (SITES[1], 1))
    for site in SITES[:2]:
        failed.count_sparse(site)
    failed.count("dense", "no plan yet")
    failed.decline("a mask of shape")
    assert failed.end(0) and session.log.sparse_sites == {SITES[0]}
    counts = session.log.counts
    assert (counts.sparse, +counts.dense, +counts.passed) == (1, {}, {})


def test_trouble_in_the_kernel_falls_back_and_strict_raises(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(evaluation_module, "run_kernel", broken)
    session = Session(policy(), sigmas=SIGMAS)
    assert all(was_dense(pair) for pair in sample(session).values())
    report = session.finish()
    assert dict(report.fallbacks)["double.0.0: RuntimeError: no such kernel"] == 3
    with pytest.raises(RuntimeError, match="no such kernel"):
        sample(Session(policy(Settings(dense_steps=2, strict=True)), sigmas=SIGMAS))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ScratchOutOfMemory("too small")])
def test_out_of_memory_is_answered_by_the_host(monkeypatch, error):
    def scarce(*arguments, **options):
        raise error

    monkeypatch.setattr(evaluation_module, "run_kernel", scarce)
    session = Session(policy(), sigmas=SIGMAS)
    assert all(was_dense(pair) for pair in sample(session).values())
    assert type(error).__name__ in session.finish().fallbacks[0][0]


def test_a_site_that_the_plan_lacks_falls_back_and_strict_raises():
    made = Session(policy(Settings(density=0.3, dense_steps=2)), sigmas=SIGMAS)
    sample(made)
    (grid,) = made.grids()
    lacking = replace(grid.plan, sites={site: entry for site, entry in grid.plan.sites.items() if site != SITES[1]})
    session = Session(policy(Settings(density=0.3, dense_steps=2), plan=lacking), sigmas=SIGMAS)
    results = sample(session)
    assert {site for (_, site), result in results.items() if not was_dense(result)} == set(SITES) - {SITES[1]}
    assert session.finish().fallbacks == [(f"{SITES[1].name} is not in the plan", len(SIGMAS) - 3)]
    with pytest.raises(RuntimeError, match=r"^strict: is not in the plan; make the plan anew"):
        sample(Session(policy(Settings(density=0.3, dense_steps=2, strict=True), plan=lacking), sigmas=SIGMAS))


def test_a_gpu_that_triton_cannot_serve_is_left_to_the_host():
    """The reference on a GPU would be slower than dense attention: it runs there only when asked for."""
    arguments = (torch.float16, 128, PRECISIONS["int8"])
    assert "mps" in resolve("auto", torch.device("mps"), *arguments).reason
    session = Session(policy(), sigmas=SIGMAS)
    assert "mps" in session._find_unsuitable(4096, torch.device("mps"), *arguments[:2])
    assert resolve("reference", torch.device("mps"), *arguments) == ("reference", {})
    assert resolve("auto", torch.device("cpu"), *arguments) == ("reference", {})
