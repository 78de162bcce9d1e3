"""The tail's kernels in the interpreter against the PyTorch reference, whose arithmetic is checked in test_method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.utils._pytree
from comfyui_paro.kernels.core.inputs import AttentionInputs
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.support import interpreted
from comfyui_paro.kernels.tail_error.api import block_costs, row_moments
from comfyui_paro.paro_runtime.calibration.tail_fit import measured_rows
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from comfyui_paro.kernels.pooling import triton_pools
from comfyui_paro.kernels.tail_error import reference as tail_reference
from comfyui_paro.kernels.tail_error import triton_block_costs, triton_row_errors

BOTH = ("triton", "reference")
CASES = {
    "ragged grid with context": (Geometry(3, (3, 7, 11), 2), {}),
    "whole blocks, no context": (Geometry(0, (1, 8, 24), 0), {"heads": 3, "kv_heads": 3}),
    "pools of 16": (Geometry(1, (3, 7, 11), 0), {"pool": 16}),
    "query blocks of 128, D 128": (Geometry(2, (3, 7, 11), 5, block_q=128), {"dim": 128, "dtype": torch.float16}),
    "grouped heads, a batch": (Geometry(0, (3, 7, 11), 3), {"heads": 4, "batch": 2, "dtype": torch.float16}),
    "tokens before heads": (Geometry(5, (3, 7, 11), 64), {"heads": 4, "batch": 2, "views": True, "biased": True}),
    "key bias, D 72": (Geometry(4, (3, 7, 11), 3), {"dim": 72, "biased": True, "batch": 2}),
    "float16, key bias, D 40": (Geometry(4, (3, 9, 13), 3), {"dim": 40, "biased": True, "dtype": torch.float16}),
}


def make(g: Geometry, *, heads=2, kv_heads=2, batch=1, dim=64, dtype=torch.float32, biased=False, pool=64, rows=16,
         views=False):  # fmt: skip
    """Fresh values every time; the first channel of V grows along the sequence, so that pools differ, and queries grow
    along each head's order, so that its mean queries do.

    biased: a key bias that hides some keys, and all of the second 64 of the first head. views: q, k and v as the host
    has them, views of `[B, L, H, D]`, here with other channels behind. float32 values are such as fp16 holds, which the
    kernels multiply: where a row looks at one key alone, rounding its logit moves the result by more than all else.
    """
    seed = torch.seed()
    q, k, v = (torch.randn(batch, n, g.length, dim) for n in (heads, kv_heads, kv_heads))
    v[..., 0] += torch.linspace(0, 3, g.length)
    tables = torch.stack([torch.randperm(g.grid_tokens) for _ in range(heads)]).int()
    growing = torch.linspace(-2, 2, g.grid_tokens)[:, None] * torch.randn(dim)
    for head in range(heads):
        q[:, head, tables[head].long() + g.prefix] += growing
    starts = torch.arange(g.q_blocks) * g.block_q
    size = (g.grid_tokens - starts).clamp_max(g.block_q)
    positions = starts[:, None] + ((torch.arange(rows) + 0.5) / rows * size[:, None]).long()
    bias = None
    if biased:
        bias = torch.randn(batch, g.length)
        bias[:, :3] = -torch.inf
        bias[:, tables[0, 64:128].long() + g.prefix] = -torch.inf
    q, k, v = (x.half().to(dtype) for x in (q, k, v))
    if views:
        q, k, v = (torch.cat([x, x + 1], 3).transpose(1, 2).contiguous()[..., :dim].transpose(1, 2) for x in (q, k, v))
    return AttentionInputs(q, k, v, g, tables, key_bias=bias), positions, {"pool": pool}, seed


def pools_in(dtype, monkeypatch):
    """Has the reference of moments round pools to the type of the inputs, as its kernel stores them: of rows far from
    their mean query that alone moves a logit by a few thousandths."""
    real = tail_reference.expanded_pools

    def rounded(means, *rest, scale, **more):
        pools = real(means, *rest, scale=scale, **more)
        pools = pools.with_keys(pools.keys.to(dtype).float(), means, scale)
        return replace(pools, values=pools.values.to(dtype).float())

    monkeypatch.setattr(tail_reference, "expanded_pools", rounded)


def close(found, expected, names, seed):
    """Relative to each table's largest value: products are in 16 bits."""
    for name in names:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape == b.shape
        worst = ((a - b).abs().max() / b.abs().max()).item()
        assert worst <= 2e-3, f"{name}: {worst:.2e} (seed {seed})"


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_block_costs(name, expanded, monkeypatch):
    g, options = CASES[name]
    inputs, positions, rest, seed = make(g, **options)
    # A mean query that is not nearly zero.
    inputs = replace(inputs, q=inputs.q + torch.randn(inputs.dim, dtype=inputs.q.dtype))
    rest["expanded"] = expanded
    # Heads in more than one group.
    monkeypatch.setattr("comfyui_paro.kernels.tail_error.triton_block_costs.GROUP_BYTES", 1)
    found, expected = (block_costs(inputs, positions, backend=b, **rest) for b in BOTH)
    close(found, expected, ("moved", "cross", "pooled_moved", "mass", "pooled", "energy"), seed)


@pytest.mark.parametrize("rows", [4, 64])
def test_block_costs_of_other_row_counts(rows):
    inputs, positions, rest, seed = make(Geometry(0, (3, 7, 11), 3), rows=rows)
    found, expected = (block_costs(inputs, positions, backend=b, **rest) for b in BOTH)
    close(found, expected, ("moved", "cross", "pooled_moved", "mass", "pooled", "energy"), seed)


@pytest.mark.parametrize("parts, expansions", [("one", 16), ("one", 0), ("many", 3), ("few pools", 16)])
@pytest.mark.parametrize("name", CASES)
def test_row_moments(name, parts, expansions, monkeypatch):
    """Rows of a tile lie in several stretches; those of one tile that leaves rows out lie in all."""
    g, options = CASES[name]
    inputs, _, rest, seed = make(g, **options)
    rest["expansions"] = expansions
    pools_in(inputs.q.dtype, monkeypatch)
    if parts == "few pools":  # of one entry at a time, sums of all
        monkeypatch.setattr(triton_row_errors, "POOL_BYTES", 1)
    if parts == "many":  # a program per key block, a group per head
        for constant, value in {"SUM_BYTES": 1, "PROGRAMS": 1000, "LEAST_BLOCKS": 1}.items():
            monkeypatch.setattr(triton_row_errors, constant, value)
    blocks = g.k_blocks + -(-g.context_tokens // 64)
    assert triton_row_errors.blocks_of_a_part(blocks, 8, torch.device("cpu")) == (1 if parts == "many" else blocks)
    positions = torch.randperm(g.grid_tokens)[:70].sort().values
    levels = torch.randint(0, 4, (inputs.heads, g.q_blocks, g.k_blocks), dtype=torch.uint8)
    found, expected = (row_moments(inputs, positions, levels, 3, backend=b, **rest) for b in BOTH)
    close(found, expected, ("moved", "cross", "pooled_moved", "mass", "pooled", "out"), seed)


def test_large_and_small_float32_values_keep_their_precision():
    """float32 goes through fp16: without a scale of its own, values of 1e6 would be infinite there and 1e-6 lost."""
    g = Geometry(0, (3, 7, 11), 3)
    inputs, positions, rest, seed = make(g)
    for factor in (2.0**20, 2.0**-20):
        scaled = replace(inputs, q=inputs.q / factor, k=inputs.k * factor, v=inputs.v * factor)
        found, expected = (block_costs(scaled, positions, backend=b, **rest) for b in BOTH)
        close(found, expected, ("moved", "cross", "pooled_moved", "mass", "pooled", "energy"), seed)


def test_float32_values_of_a_batch_may_differ_in_size():
    """Costs are summed over the batch: a unit of its own for each entry would weigh them wrongly."""
    inputs, positions, rest, seed = make(Geometry(0, (3, 7, 11), 3), batch=2)
    inputs.v[1] *= 5
    found, expected = (block_costs(inputs, positions, backend=b, **rest) for b in BOTH)
    close(found, expected, ("moved", "cross", "pooled_moved", "mass", "pooled", "energy"), seed)


def test_an_odd_number_of_rows_is_refused():
    inputs, _, rest, _ = make(Geometry(0, (3, 7, 11), 3))
    with pytest.raises(ValueError, match="power of two"):
        block_costs(inputs, torch.zeros(4, 12, dtype=torch.long), backend="triton", **rest)


def test_heads_too_wide_for_the_kernels_go_to_the_reference(monkeypatch):
    inputs, positions, rest, _ = make(Geometry(0, (2, 4, 8), 0), dim=160)

    def refused(*_, **__):
        raise AssertionError

    monkeypatch.setattr("comfyui_paro.kernels.tail_error.triton_block_costs.launch_block_costs", refused)
    found, expected = (block_costs(inputs, positions, backend=b, **rest) for b in BOTH)
    assert torch.equal(found.moved, expected.moved)


def test_values_with_a_large_common_part():
    """Blocks then differ little from the output: it must not be rounded to 16 bits."""
    inputs, positions, rest, seed = make(Geometry(0, (3, 7, 11), 3))
    inputs = replace(inputs, q=inputs.q.half(), k=inputs.k.half(), v=(inputs.v + 10).half())
    found, expected = (block_costs(inputs, positions, backend=b, **rest) for b in BOTH)
    close(found, expected, ("moved", "cross", "pooled_moved"), seed)


def test_weights_of_a_millionth_keep_their_precision(monkeypatch):
    """As on long sequences: a context token takes nearly everything, and fp16 alone would round the rest to nothing."""
    g = Geometry(1, (3, 7, 11), 0)
    inputs, positions, rest, seed = make(g, dtype=torch.float16, biased=True)
    inputs.key_bias[:] = 0
    inputs.key_bias[:, 0] = 20
    found, expected = (block_costs(inputs, positions, backend=b, **rest) for b in BOTH)
    close(found, expected, ("moved", "cross", "pooled_moved", "mass", "pooled"), seed)
    levels = torch.randint(0, 2, (2, g.q_blocks, g.k_blocks), dtype=torch.uint8)
    some = torch.arange(0, g.grid_tokens, 3)
    pools_in(inputs.q.dtype, monkeypatch)
    found, expected = (row_moments(inputs, some, levels, 1, backend=b, **rest) for b in BOTH)
    close(found, expected, ("moved", "cross", "pooled_moved", "mass", "pooled"), seed)


class Allocated(TorchDispatchMode):
    """Bytes of all new tensors, whether they are still there or not: no less than what is held at a time."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)}
        for x in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given:
                self.bytes += x.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grid, heads", [((21, 45, 80), 40), ((31, 45, 80), 16), ((21, 30, 52), 12), ((1, 64, 64), 24)])
def test_memory_of_a_large_call_is_bounded(grid, heads, dtype, monkeypatch):
    """Real sizes, kernels that run nothing: beside results, no copy of keys, values or of what is in their order."""

    class Nothing:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    kernels = {
        triton_row_errors: ("_row_sums", "_row_moments"),
        triton_pools: ("_mean_queries", "_expand"),
        triton_block_costs: ("_row_outputs", "_block_costs"),
    }
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, Nothing())
    monkeypatch.setattr(triton_row_errors, "processors", lambda device: 132)
    g = Geometry(0, grid, 0, 128)
    q = torch.zeros(1, 1, 1, 1, dtype=dtype).expand(1, heads, g.length, 128)
    tables = torch.zeros(1, dtype=torch.int32).expand(heads, g.grid_tokens)
    if dtype == torch.float32:
        # What they are depends on the values, of which there are too many for a test.
        monkeypatch.setattr(triton_row_errors, "units_of", lambda *_: torch.ones(3, heads))
        monkeypatch.setattr(triton_block_costs, "units_of", lambda *_: torch.ones(3, heads))
    tables = tables.contiguous()
    levels = torch.zeros(1, dtype=torch.uint8).expand(heads, g.q_blocks, g.k_blocks).contiguous()
    positions = torch.zeros(measured_rows(g.grid_tokens), dtype=torch.long)
    inputs = AttentionInputs(q, q, q, g, tables)
    with Allocated() as allocated:
        triton_row_errors.launch_row_moments(inputs, positions, levels, 1, pool=64, expansions=16)
    assert allocated.bytes < 100 << 20
    with Allocated() as allocated:
        costs = triton_block_costs.launch_block_costs(inputs, positions[:1].expand(g.q_blocks, 16), pool=64)
    assert allocated.bytes - 5 * costs.mass.numel() * 4 < 100 << 20
