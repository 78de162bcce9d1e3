"""The correction by mean queries: what it is for, and the kernel in the interpreter against the PyTorch reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.api import add_corrections, query_corrections, sparse_attention
from comfyui_paro.kernels.problem import Geometry, Precision, SparsePattern
from comfyui_paro.kernels.support import interpreted

from .kernel_cases import with_mask

EXACT = Precision("16", "16")
CASES = {
    "ragged grid with context": (Geometry(3, (3, 7, 11), 2), {}),
    "whole blocks, no context": (Geometry(0, (1, 8, 24), 0), {"heads": 3, "kv_heads": 3}),
    "context of more than a block": (Geometry(70, (2, 8, 9), 7), {}),
    "query blocks of 128, D 128": (Geometry(2, (3, 7, 11), 5, block_q=128), {"dim": 128}),
    "grouped heads, a batch": (Geometry(0, (3, 7, 11), 3), {"heads": 4, "batch": 2}),
    "key bias, D 72": (Geometry(4, (3, 7, 11), 3), {"dim": 72, "biased": True, "batch": 2}),
    "more pools than a block holds": (Geometry(0, (5, 32, 27), 0), {"heads": 1, "kv_heads": 1, "dim": 32}),
}


def make(g, *, heads=2, kv_heads=2, batch=1, dim=64, dtype=torch.float16, biased=False, density=0.4):
    """Fresh values every time. The first channel of V grows along the sequence, so that blocks differ; queries have
    something in common, or little would be left of their mean."""
    seed = torch.seed()
    q, k, v = (torch.randn(batch, n, g.length, dim, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    q += 2 * torch.randn(batch, heads, 1, dim)
    v[..., 0] += torch.linspace(0, 3, g.length)
    tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(kv_heads)]).int()
    mask = torch.rand(heads, g.q_blocks, g.k_blocks) < density
    mask[:, 0] = True
    mask[:, -1] = False
    pattern = SparsePattern.from_mask(g, tables, torch.arange(kv_heads).int(), mask, torch.randn(heads))
    bias = None
    if biased:
        bias = torch.randn(batch, g.length)
        bias[:, :3] = -torch.inf
    return (q.to(dtype), k.to(dtype), v.to(dtype), pattern), bias, seed


@pytest.mark.parametrize("name", CASES)
def test_gives_back_all_that_was_missed_where_the_queries_of_a_group_are_alike(name):
    """Then the mean query is every query, and sparse attention plus its correction is dense attention."""
    g, options = CASES[name]
    (q, k, v, pattern), bias, seed = make(g, **{**options, "dtype": torch.float64})
    for head in range(q.shape[1]):
        rows = pattern.tables[head // (q.shape[1] // k.shape[1])].long() + g.prefix
        for start in range(0, g.grid_tokens, g.block_q):
            q[:, head, rows[start : start + g.block_q]] = q[:, head, rows[start : start + 1]]
    heads = torch.arange(q.shape[1]).int()
    rest = {"key_bias": bias, "backend": "reference"}
    sparse = sparse_attention(q, k, v, pattern, EXACT, **rest)
    everything = SparsePattern(g, pattern.tables, pattern.order_of_head)
    dense = sparse_attention(q, k, v, everything, EXACT, **rest)
    assert (sparse - dense).abs().max() > 1e-2
    corrections = query_corrections(q, k, v, pattern, heads, **rest)
    shares = torch.ones(q.shape[1], dtype=torch.float64)
    given = add_corrections(sparse.clone(), corrections, shares, pattern, heads, backend="reference")
    assert (given - dense).abs().max() < 1e-10, f"seed {seed}"
    # Half of it, and of some heads only.
    part = add_corrections(sparse.clone(), corrections[:, 1:], shares / 2, pattern, heads[1:], backend="reference")
    assert torch.equal(part[:, 0], sparse[:, 0])
    assert (part[:, 1:] - (sparse + dense)[:, 1:] / 2).abs().max() < 1e-10 if q.shape[1] > 1 else True


def test_nothing_to_correct_where_every_block_is_kept():
    (q, k, v, pattern), _, _ = make(Geometry(3, (3, 7, 11), 2), density=2)
    pattern = with_mask(pattern, torch.ones_like(pattern.mask))
    assert query_corrections(q, k, v, pattern, torch.arange(2).int(), backend="reference").abs().max() < 1e-5


def test_refusals():
    (q, k, v, pattern), _, _ = make(Geometry(3, (3, 7, 11), 2))
    heads = torch.arange(2).int()
    for wrong, message in (
        ({"kept_words": None}, "correction: the pattern has no mask or no tail"),
        ({"tail_bias": None}, "correction: the pattern has no mask or no tail"),
        ({"pool": 16}, "correction: pools of 64 keys are supported, got 16"),
    ):
        with pytest.raises(ValueError, match=message):
            query_corrections(q, k, v, replace(pattern, **wrong), heads, backend="reference")
    with pytest.raises(ValueError, match="heads must be int32"):
        query_corrections(q, k, v, pattern, heads.long(), backend="reference")
    with pytest.raises(ValueError, match="length: the layout has"):
        query_corrections(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], pattern, heads, backend="reference")


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 before Triton is imported")
@pytest.mark.parametrize("name", CASES)
def test_kernel(name):
    g, options = CASES[name]
    (q, k, v, pattern), bias, seed = make(g, **options)
    heads = torch.arange(q.shape[1]).int().flip(0)
    found, expected = (
        query_corrections(q, k, v, pattern, heads, key_bias=bias, scale=0.2, backend=b) for b in ("triton", "reference")
    )
    assert found.shape == expected.shape
    worst = ((found - expected).abs().max() / expected.abs().max()).item()
    assert worst < 3e-3, f"{worst:.2e} (seed {seed})"
    shares, out = torch.rand(q.shape[1]), torch.randn_like(q.transpose(1, 2)).transpose(1, 2)
    some = heads[:1]
    flag = torch.zeros(4, dtype=torch.int32)
    given = [
        add_corrections(out.clone(), expected[:, :1].float(), shares, pattern, some, nonfinite=flag, backend=b)
        for b in ("triton", "reference")
    ]
    assert (given[0].float() - given[1].float()).abs().max() <= 4e-3
    assert not torch.equal(given[0], out) and not flag.any()
    expected[:, :1, 0, 0] = torch.nan
    add_corrections(out.clone(), expected[:, :1].float(), shares, pattern, some, nonfinite=flag, backend="triton")
    assert flag[0] == 1
