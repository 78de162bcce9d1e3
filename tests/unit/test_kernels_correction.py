"""The correction by mean queries: what it is for, and the kernel in the interpreter against the PyTorch reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels import correction_reference
from comfyui_paro.kernels.api import add_corrections, query_corrections, sparse_attention
from comfyui_paro.kernels.pools import expanded_pools, mean_queries
from comfyui_paro.kernels.problem import Geometry, Precision, SparsePattern
from comfyui_paro.kernels.reference import pool_rows
from comfyui_paro.kernels.support import interpreted

from .kernel_cases import with_mask

EXACT = Precision("16", "16")
# Geometry, rows of a mean query, expansions.
CASES = {
    "ragged grid with context": (Geometry(3, (3, 7, 11), 2), 8, 3, {}),
    "whole blocks, no context": (Geometry(0, (1, 8, 24), 0), 64, 16, {"heads": 3, "kv_heads": 3}),
    "context of more than a block, plain means": (Geometry(70, (2, 8, 9), 7), 16, 0, {}),
    "a mean query for 128 rows, D 128": (Geometry(2, (3, 7, 11), 5, block_q=128), 128, 16, {"dim": 128}),
    "half a query block": (Geometry(2, (3, 9, 13), 5, block_q=128), 64, 3, {}),
    "grouped heads, a batch": (Geometry(0, (3, 9, 13), 3, block_q=128), 8, 16, {"heads": 4, "batch": 2}),
    "key bias, D 72": (Geometry(4, (3, 7, 11), 3), 16, 16, {"dim": 72, "biased": True, "batch": 2}),
    "more pools than a block holds": (
        Geometry(0, (5, 32, 27), 0, block_q=128), 32, 16, {"heads": 1, "kv_heads": 1, "dim": 32},
    ),
    "plain means, key bias, a block": (Geometry(0, (3, 7, 11), 3), 64, 0, {"heads": 4, "biased": True, "batch": 2}),
}  # fmt: skip


def make(g, expansions=3, *, heads=2, kv_heads=2, batch=1, dim=64, dtype=torch.float16, biased=False, density=0.4):
    """Fresh values every time. The first channel of V grows along the sequence, so that blocks differ; queries that
    follow each other have something in common, or little would be left of their mean, and other things further on.

    biased: a key bias that hides some keys, and all of the second 64 of the first order."""
    seed = torch.seed()
    q, k, v = (torch.randn(batch, n, g.length, dim, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    q += 2 * torch.randn(batch, heads, 1, dim)
    v[..., 0] += torch.linspace(0, 3, g.length)
    tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(kv_heads)]).int()
    growing = torch.linspace(-2, 2, g.grid_tokens)[:, None] * torch.randn(dim)
    for head in range(heads):
        q[:, head, tables[head // (heads // kv_heads)].long() + g.prefix] += growing
    mask = torch.rand(heads, g.q_blocks, g.k_blocks) < density
    mask[:, 0] = True
    mask[:, -1] = False
    # Where pools are exact at the mean query, only a bias is wrong about them.
    tail = 0.5 + torch.rand(heads)
    pattern = SparsePattern.from_mask(g, tables, torch.arange(kv_heads).int(), mask, tail, 64, expansions)
    bias = None
    if biased:
        bias = torch.randn(batch, g.length)
        bias[:, :3] = -torch.inf
        bias[:, tables[0, 64:128].long() + g.prefix] = -torch.inf
    return (q.to(dtype), k.to(dtype), v.to(dtype), pattern), bias, seed


def as_the_kernel_rounds(monkeypatch, dtype: torch.dtype) -> None:
    """Has the reference round mean queries and pooled keys to 16 bits, as they are stored on a GPU. A row that is
    another by that looks elsewhere: more than what its weights are off by."""

    def rounded(x):
        return x.to(dtype).to(x.dtype)

    def pools(means, *rest, scale, **more):
        found = expanded_pools(means, *rest, scale=scale, **more)
        return found.with_keys(rounded(found.keys), means, scale)

    for name, function in (("pool_rows", pool_rows), ("mean_queries", mean_queries)):
        monkeypatch.setattr(correction_reference, name, lambda *args, its=function: rounded(its(*args)))
    monkeypatch.setattr(correction_reference, "expanded_pools", pools)


@pytest.mark.parametrize("name", CASES)
def test_gives_back_all_that_was_missed_where_the_queries_of_a_group_are_alike(name):
    """Then the mean query is every query, and sparse attention plus its correction is dense attention."""
    g, count, expansions, options = CASES[name]
    (q, k, v, pattern), bias, seed = make(g, expansions, **{**options, "dtype": torch.float64})
    for head in range(q.shape[1]):
        rows = pattern.tables[head // (q.shape[1] // k.shape[1])].long() + g.prefix
        for start in range(0, g.grid_tokens, count):
            q[:, head, rows[start : start + count]] = q[:, head, rows[start : start + 1]]
    heads = torch.arange(q.shape[1]).int()
    rest = {"key_bias": bias, "backend": "reference"}
    sparse = sparse_attention(q, k, v, pattern, EXACT, **rest)
    everything = SparsePattern(g, pattern.tables, pattern.order_of_head)
    dense = sparse_attention(q, k, v, everything, EXACT, **rest)
    assert (sparse - dense).abs().max() > 1e-2
    corrections = query_corrections(q, k, v, pattern, heads, rows=count, **rest)
    shares = torch.ones(q.shape[1], dtype=torch.float64)
    chosen = {"rows": count, "backend": "reference"}
    given = add_corrections(sparse.clone(), corrections, shares, pattern, heads, **chosen)
    assert (given - dense).abs().max() < 1e-10, f"seed {seed}"
    # Half of it, and of some heads only.
    part = add_corrections(sparse.clone(), corrections[:, 1:], shares / 2, pattern, heads[1:], **chosen)
    assert torch.equal(part[:, 0], sparse[:, 0])
    assert (part[:, 1:] - (sparse + dense)[:, 1:] / 2).abs().max() < 1e-10 if q.shape[1] > 1 else True


def test_nothing_to_correct_where_every_block_is_kept():
    (q, k, v, pattern), _, _ = make(Geometry(3, (3, 7, 11), 2), density=2)
    pattern = with_mask(pattern, torch.ones_like(pattern.mask))
    found = query_corrections(q, k, v, pattern, torch.arange(2).int(), rows=16, backend="reference")
    assert found.abs().max() < 1e-5


def test_refusals():
    (q, k, v, pattern), _, _ = make(Geometry(3, (3, 7, 11), 2))
    heads, rest = torch.arange(2).int(), {"rows": 64, "backend": "reference"}
    for wrong, message in (
        ({"kept_words": None}, "correction: the pattern has no mask or no tail"),
        ({"tail_bias": None}, "correction: the pattern has no mask or no tail"),
        ({"pool": 16}, "correction: pools of 64 keys are supported, got 16"),
    ):
        with pytest.raises(ValueError, match=message):
            query_corrections(q, k, v, replace(pattern, **wrong), heads, **rest)
    with pytest.raises(ValueError, match="heads must be int32"):
        query_corrections(q, k, v, pattern, heads.long(), **rest)
    with pytest.raises(ValueError, match="length: the layout has"):
        query_corrections(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], pattern, heads, **rest)
    for rows in (4, 12, 128):
        with pytest.raises(ValueError, match=f"rows, at most a query block's, got {rows}"):
            query_corrections(q, k, v, pattern, heads, rows=rows, backend="reference")
    with pytest.raises(ValueError, match="corrections: 4 mean queries, expected 29 of 8 rows"):
        add_corrections(q, torch.zeros(1, 2, 4, 64), torch.ones(2), pattern, heads, rows=8)


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 before Triton is imported")
@pytest.mark.parametrize("name", CASES)
def test_kernel(name, monkeypatch):
    g, rows, expansions, options = CASES[name]
    (q, k, v, pattern), bias, seed = make(g, expansions, **options)
    heads, rest = torch.arange(q.shape[1]).int().flip(0), {"rows": rows, "key_bias": bias, "scale": 0.2}
    as_the_kernel_rounds(monkeypatch, q.dtype)
    found, expected = (query_corrections(q, k, v, pattern, heads, backend=b, **rest) for b in ("triton", "reference"))
    assert found.shape == expected.shape
    # The difference of two weighted means, however small; the weights of each are off by half a unit of 16 bits.
    worst = ((found - expected).abs().max() / v.abs().max()).item()
    assert worst < torch.finfo(v.dtype).eps / 2, f"{worst:.2e} (seed {seed})"
    shares, out = torch.rand(q.shape[1]), torch.randn_like(q.transpose(1, 2)).transpose(1, 2)
    some = heads[:1]
    flag = torch.zeros(4, dtype=torch.int32)
    rest = {"rows": rows, "nonfinite": flag}
    # As they are made, and as they are kept for later steps.
    for kind in (torch.float32, out.dtype):
        given = [
            add_corrections(out.clone(), expected[:, :1].to(kind), shares, pattern, some, backend=b, **rest)
            for b in ("triton", "reference")
        ]
        assert (given[0].float() - given[1].float()).abs().max() <= 4e-3
        assert not torch.equal(given[0], out) and not flag.any()
    expected[:, :1, -1, 0] = torch.nan
    add_corrections(out.clone(), expected[:, :1].float(), shares, pattern, some, backend="triton", **rest)
    assert flag[0] == 1


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 before Triton is imported")
def test_heads_whose_pools_take_much_memory_are_done_apart(monkeypatch):
    (q, k, v, pattern), _, _ = make(Geometry(3, (3, 7, 11), 2), heads=4, batch=2)
    heads = torch.tensor([3, 0, 2], dtype=torch.int32)
    together = query_corrections(q, k, v, pattern, heads, rows=16, backend="triton")
    monkeypatch.setattr("comfyui_paro.kernels.triton_correction.GROUP_BYTES", 1)
    # Keys are split over more programs then: weights are rounded relative to other scores.
    apart = query_corrections(q, k, v, pattern, heads, rows=16, backend="triton")
    assert (apart - together).abs().max() < 2e-3 * together.abs().max()
