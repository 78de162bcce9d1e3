"""The self-check runs what sparse steps run, fails when any of it is broken, and remembers wrong numbers only."""

from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.core.precision import PRECISIONS
from comfyui_paro.paro_runtime.compiling import self_check as module
from comfyui_paro.paro_runtime.compiling.self_check import self_check

CPU = torch.device("cpu")
run = module.run_kernel
BREAKS = {
    "the mask is ignored": lambda p: replace(p, kept_words=None),
    "the mask is shifted": lambda p: replace(p, kept_words=p.kept_words.roll(1, 1)),
    "the tail is left out": lambda p: replace(p, tail_bias=None),
    "pools are plain means": lambda p: replace(p, expansions=0),
    "heads' orders are mixed up": lambda p: replace(p, order_of_head=p.order_of_head.flip(0)),
}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(module, "_checked", {})


def broken(how):
    """The kernels with one thing wrong in calls with a mask; the reference that they are compared with stays right."""

    def call(q, k, v, pattern, precision, **rest):
        exact = precision == PRECISIONS["16bit"] and q.dtype == torch.float32
        return run(q, k, v, pattern if exact or pattern.kept_words is None else how(pattern), precision, **rest)

    return call


@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("pool", [64, None])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_healthy_kernels_pass(precision, pool, block_q):
    assert self_check(CPU, torch.float16, 64, precision, "reference", block_q=block_q, pool=pool) is None


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_broken_kernels_fail(monkeypatch, precision, how):
    monkeypatch.setattr(module, "run_kernel", broken(BREAKS[how]))
    assert "relative error" in self_check(CPU, torch.float16, 64, precision, "reference")


@pytest.mark.parametrize("precision", ["int8", "int8_pv8", "int4"])
def test_the_kernels_pass_in_the_interpreter(precision):
    assert self_check(CPU, torch.float16, 64, precision, "triton") is None


def test_a_result_that_is_not_finite_is_wrong(monkeypatch):
    def poisoned(*args, **rest):
        return run(*args, **rest) * float("nan" if args[0].dtype == torch.float16 else 1)

    monkeypatch.setattr(module, "run_kernel", poisoned)
    assert "relative error nan" in self_check(CPU, torch.float16, 64, "int8", "reference")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error"), ValueError()])
def test_what_passes_is_not_remembered(monkeypatch, error):
    def failing(*args, **rest):
        raise error

    monkeypatch.setattr(module, "run_kernel", failing)
    assert type(error).__name__ in self_check(CPU, torch.float16, 64, "int8", "reference")
    monkeypatch.setattr(module, "run_kernel", run)
    assert self_check(CPU, torch.float16, 64, "int8", "reference") is None


def test_wrong_numbers_are_remembered(monkeypatch):
    monkeypatch.setattr(module, "run_kernel", broken(BREAKS["the mask is ignored"]))
    found = self_check(CPU, torch.float16, 64, "int8", "reference")
    monkeypatch.setattr(module, "run_kernel", run)
    assert found and self_check(CPU, torch.float16, 64, "int8", "reference") == found
    assert self_check(CPU, torch.float16, 32, "int8", "reference") is None
