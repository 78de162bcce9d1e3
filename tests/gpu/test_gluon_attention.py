"""The Gluon kernel on sm_90 against the float64 oracle and the Triton kernel: ragged ends, lists, tails, groups."""

from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.attention.gluon_sm90 import launch as gluon_launch
from comfyui_paro.kernels.attention.launch import launch_attention, pieces_of
from comfyui_paro.kernels.attention.reference import sparse_attention_reference
from comfyui_paro.kernels.core.precision import PRECISIONS
from comfyui_paro.tests.unit.kernels.cases import Case, make, oracle, relative_error

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == gluon_launch.CAPABILITY
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_hopper, reason="no GPU of sm_90: the Gluon kernel is not tested"),
]

BOUNDS = {"fp8": 4.5e-2, "int8": 1.5e-2}
# Both compute the same numbers in another order; fp8 weights may round the other way.
# The two round some weights from different running maxima: of an e4m3 step (its error is 3.5e-2) a fraction remains.
BETWEEN = {"fp8": 1.5e-2, "int8": 2e-3}
CASES = [
    Case("ragged grid, dense", mask=None),
    Case("ragged grid and context, dense", mask=None, prefix=5, suffix=3),
    Case("whole blocks, dense", mask=None, grid=(2, 8, 16), prefix=64),
    Case("20 tokens", grid=(1, 4, 5), mask=None),
    Case("list, ragged everywhere", grid=(3, 10, 11), prefix=70, suffix=7),
    Case("list, rows of odd and even length", grid=(4, 16, 16), mask=0.4),
    Case("a single kept block in the whole mask", mask="one", prefix=1),
    Case("tail, ragged last pool", grid=(3, 10, 11), prefix=9, tail=True),
    Case("the tail alone but for one block a row", grid=(4, 16, 16), mask="one", tail=True, suffix=2),
    Case("tail over two words of mask", grid=(5, 32, 31), mask=0.2, tail=True),
    Case("tail over three words of mask, the last step half full", grid=(8, 32, 41), mask=0.2, tail=True),
    Case("batch of two, grouped queries, tail", batch=2, heads=4, kv_heads=2, tail=True, grid=(3, 10, 11)),
    Case("tail with plain means", tail=True, expansions=0, grid=(3, 10, 11), suffix=4),
    Case("views of a fused projection", strided=True, suffix=4, tail=True),
    Case("bf16", dtype=torch.bfloat16, suffix=4, tail=True),
]


@pytest.fixture(autouse=True)
def both_kernels():
    gluon_launch.forbid(None)
    gluon_launch.prefer_always(True)
    yield
    gluon_launch.forbid(None)
    gluon_launch.prefer_always(False)


def on_gpu(case: Case):
    q, k, v, pattern, _ = make(case)
    return q.cuda(), k.cuda(), v.cuda(), pattern.to("cuda")


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_the_oracle_and_as_triton(case: Case, dim: int, precision: str):
    case = replace(case, dim=dim, block_q=128)
    q, k, v, pattern = on_gpu(case)
    assert all(piece.call.gluon for piece in pieces_of(q, k, v, q, pattern, PRECISIONS[precision]))
    # Poisoned: every element must be written.
    out = launch_attention(q, k, v, pattern, PRECISIONS[precision], out=torch.full_like(q, torch.nan))
    assert gluon_launch.why_unwanted(128, PRECISIONS["int8"], "tail") is None, "the kernel could not be launched"
    expected = oracle(*(x.cpu() for x in (q, k, v)), pattern.to("cpu"))
    assert relative_error(out.cpu(), expected) < BOUNDS[precision]
    gluon_launch.forbid("compared")
    other = launch_attention(q, k, v, pattern, PRECISIONS[precision])
    assert relative_error(out, other) < BETWEEN[precision]


@pytest.mark.parametrize("expansions", [16, 5, 0])
def test_every_query_block_looks_at_the_pools_of_its_head_and_stretch(expansions: int):
    """Queries that differ from stretch to stretch and head to head, one block kept in a row. Against the reference,
    which rounds as the kernel does; with the pools of another stretch or head the error is some tenths."""
    case = Case(
        "", dim=128, block_q=128, grid=(5, 32, 31), mask=0.0, tail=True, drift=3.0, orders="axes", batch=2, heads=4,
        suffix=3, expansions=expansions,
    )  # fmt: skip
    q, k, v, pattern = on_gpu(case)
    out = launch_attention(q, k, v, pattern, PRECISIONS["int8"])
    assert gluon_launch.why_unwanted(128, PRECISIONS["int8"], "tail") is None, "the kernel could not be launched"
    expected = sparse_attention_reference(q, k, v, pattern, PRECISIONS["int8"])
    assert relative_error(out, expected) < 5e-3


@pytest.mark.parametrize("precision", BOUNDS)
def test_same_bits_every_time(precision: str):
    q, k, v, pattern = on_gpu(Case("", dim=128, block_q=128, grid=(5, 32, 31), mask=0.3, tail=True))
    first = launch_attention(q, k, v, pattern, PRECISIONS[precision])
    for _ in range(5):
        assert torch.equal(first, launch_attention(q, k, v, pattern, PRECISIONS[precision]))


def test_what_is_not_finite_is_told():
    q, k, v, pattern = on_gpu(Case("", dim=128, block_q=128, grid=(3, 10, 11), mask=0.5, tail=True))
    flag = torch.zeros(4, dtype=torch.int32, device="cuda")
    launch_attention(q, k, v, pattern, PRECISIONS["int8"], nonfinite=flag)
    assert flag.tolist() == [0, 0, 0, 0]
    v[0, 1, 40, 3] = torch.inf
    launch_attention(q, k, v, pattern, PRECISIONS["int8"], nonfinite=flag)
    assert flag.tolist() == [1, 0, 0, 0]
