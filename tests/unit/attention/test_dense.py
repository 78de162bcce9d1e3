"""Dense attention in 16 bits: cuDNN where it is faster and right, the host's own where it is not."""

import pytest
import torch
from comfyui_paro.paro_runtime.attention import dense

Q = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(monkeypatch):
    """As on a GPU that cuDNN is faster on; who was asked, and what cuDNN gives back: `calls.cudnn = ...`."""

    class Calls(list):
        cudnn = staticmethod(lambda: torch.nn.functional.scaled_dot_product_attention(Q, Q, Q))

    calls = Calls()

    def cudnn(q, k, v, *, scale):
        calls.append("cudnn")
        return calls.cudnn()

    monkeypatch.setattr(dense, "_proven", {})
    monkeypatch.setattr(dense, "capability_of_gpu", lambda device: (9, 0))
    monkeypatch.setattr(dense, "CUDNN_FASTER_FROM", {(9, 64): 40})
    monkeypatch.setattr(dense, "cudnn_serves", lambda q, k, v: True)
    monkeypatch.setattr(dense, "cudnn_attention", cudnn)
    return calls


def ask(calls, q=Q) -> torch.Tensor:
    def host():
        calls.append("host")
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    return dense.in_16_bits(q, q, q, None, host)


def test_the_first_call_of_a_shape_runs_both_and_later_ones_cudnn(calls):
    for _ in range(3):
        assert torch.equal(ask(calls), calls.cudnn())
    assert calls == ["cudnn", "host", "cudnn", "cudnn"]


def test_a_result_that_differs_ends_it_for_the_shape(calls, caplog):
    right = calls.cudnn
    calls.cudnn = lambda: right() * 1.05
    for _ in range(2):
        assert torch.equal(ask(calls), right())
    assert calls == ["cudnn", "host", "host"] and "40 tokens (it differs" in caplog.text


@pytest.mark.parametrize("error, tries", [(RuntimeError("no engine"), 1), (torch.OutOfMemoryError("full"), 2)])
def test_trouble_is_answered_by_the_host(calls, caplog, error, tries):
    right = calls.cudnn

    def fail():
        raise error

    calls.cudnn = fail
    for _ in range(2):
        assert torch.equal(ask(calls), right())
    assert calls.count("cudnn") == tries and calls.count("host") == 2
    assert ("no engine" in caplog.text) == (tries == 1)


def test_without_memory_to_compare_another_call_is_compared(calls, monkeypatch):
    norm = torch.Tensor.norm

    def full(self, *rest, **more):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.Tensor, "norm", full)
    assert torch.equal(ask(calls), calls.cudnn()) and not dense._proven
    monkeypatch.setattr(torch.Tensor, "norm", norm)
    ask(calls), ask(calls)
    assert calls == ["cudnn", "host", "cudnn", "host", "cudnn"]


def test_what_is_not_finite_anyway_says_nothing(calls):
    right = calls.cudnn
    calls.cudnn = lambda: right() * torch.nan
    assert not torch.isfinite(dense.in_16_bits(Q, Q, Q, None, calls.cudnn)).any() and not dense._proven


def test_other_strides_are_tried_by_themselves(calls):
    for q in (Q, Q.transpose(1, 2).contiguous().transpose(1, 2), Q):
        assert torch.equal(ask(calls, q), calls.cudnn())
    assert calls == ["cudnn", "host", "cudnn", "host", "cudnn"]


@pytest.mark.parametrize("case", ["short", "other head", "not served", "other GPU"])
def test_elsewhere_the_host_is_asked(calls, monkeypatch, case):
    q = Q
    if case == "short":
        q = Q[:, :, :39]
    elif case == "other head":
        q = Q[..., :32]
    elif case == "not served":
        monkeypatch.setattr(dense, "cudnn_serves", lambda q, k, v: False)
    else:
        monkeypatch.setattr(dense, "capability_of_gpu", lambda device: None)
    ask(calls, q)
    assert calls == ["host"]
