"""Expanded pools: what they promise, and Triton (interpreted) against the reference."""

import math

import pytest
import torch
from comfyui_paro.kernels.core.inputs import AttentionInputs
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.support import interpreted
from comfyui_paro.kernels.pooling.reference import (
    expanded_pools,
    mean_queries,
    stretch_bounds,
    stretch_of_rows,
    stretches_of,
)

from .cases import relative_error

GEOMETRIES = {
    "ragged, two stretches of several blocks": (Geometry(2, (3, 9, 13), 1), 2, 64),
    "a stretch for each block": (Geometry(0, (3, 9, 13), 0), 16, 64),
    "stretches longer than the rows looked at": (Geometry(1, (1, 20, 26), 3, block_q=128), 2, 64),
    "pools of 16": (Geometry(0, (1, 10, 15), 2), 3, 16),
    "plain means": (Geometry(3, (1, 10, 15), 0), 0, 64),
}


def sample(seed=0, heads=2, tokens=150, dim=32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, tokens, dim, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("pool", [64, 16])
def test_a_pool_is_exact_at_its_mean_query_and_to_first_order_around_it(pool):
    q, k, v = sample()
    g = Geometry(0, (1, 10, 15), 0)
    means, scale = mean_queries(q * 2, g, 3), 32**-0.5
    pools = expanded_pools(means, k, v, pool, scale=scale)
    for s in range(3):
        for step, power in ((0.0, 0), (1e-3, 2)):
            query = means[:, :, s] + step * torch.ones(32, dtype=q.dtype)
            logits = torch.einsum("bhd,bhnd->bhn", query, k) * scale
            parts = list(zip(logits.split(pool, 2), v.split(pool, 2), strict=True))
            exact = torch.stack([part.logsumexp(2) for part, _ in parts], 2)
            found = torch.einsum("bhd,bhpd->bhp", query, pools.keys[:, :, s]) * scale + pools.bias[:, :, s]
            # The second order is what is left: a variance of logits, half of it times the step squared.
            assert (found - exact).abs().max() < (1e-10 if power == 0 else 50 * step**power)
            if not step:
                values = torch.stack([(part.softmax(2)[..., None] * of).sum(2) for part, of in parts], 2)
                assert torch.allclose(pools.values[:, :, s], values)


def test_plain_means_are_means():
    q, k, v = sample(1)
    g = Geometry(0, (1, 10, 15), 0)
    pools = expanded_pools(mean_queries(q, g, 0), k, v, 64, scale=0.3)
    assert torch.allclose(pools.keys[:, :, 0, 1], k[:, :, 64:128].mean(2))
    assert torch.allclose(pools.values[:, :, 0, 2], v[:, :, 128:].mean(2))
    assert torch.allclose(pools.bias[0, 0, 0].exp(), torch.tensor([64.0, 64, 22], dtype=k.dtype))


def test_a_hidden_key_does_not_count_and_a_hidden_pool_weighs_nothing():
    q, k, v = sample(2)
    g = Geometry(0, (1, 10, 15), 0)
    means, bias = mean_queries(q, g, 2), torch.zeros(1, 2, 150)
    bias[:, :, 3] = bias[:, :, 64:128] = -torch.inf
    pools = expanded_pools(means, k, v, 64, scale=0.3, key_bias=bias)
    stays = torch.arange(150) != 3
    without = expanded_pools(means, k[:, :, stays], v[:, :, stays], 63, scale=0.3)
    assert torch.allclose(pools.keys[:, :, :, 0], without.keys[:, :, :, 0])
    assert torch.allclose(pools.bias[:, :, :, 0], without.bias[:, :, :, 0])
    assert pools.bias.isfinite().all() and (pools.bias[:, :, :, 1] < -1e29).all()


def test_better_keys_keep_the_weight_at_the_mean_query():
    q, k, v = sample(3)
    g = Geometry(0, (1, 10, 15), 0)
    means = mean_queries(q, g, 2)
    pools = expanded_pools(means, k, v, 64, scale=0.3)
    other = pools.with_keys(pools.keys + 0.1, means, 0.3)
    rows, stretch = means, torch.arange(2)
    assert torch.allclose(other.logits(rows, stretch, 0.3), pools.logits(rows, stretch, 0.3))
    assert not torch.allclose(other.bias, pools.bias)


@pytest.mark.parametrize("q_blocks", [1, 5, 16, 17, 40])
def test_stretches_are_runs_of_whole_blocks(q_blocks):
    g = Geometry(0, (1, 1, q_blocks * 64 - 7), 0)
    stretches = stretches_of(g, 16)
    found = stretch_of_rows(g, stretches, torch.arange(g.grid_tokens))
    bounds = stretch_bounds(g, stretches)
    assert [found[a].item() for a, _ in bounds] == list(range(stretches)) == [found[b - 1].item() for _, b in bounds]
    assert all(a % 64 == 0 for a, _ in bounds) and bounds[-1][1] == g.grid_tokens


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_triton_is_the_reference(name, dtype, biased):
    from comfyui_paro.kernels.pooling.triton_pools import PoolBuffers, launch_expanded_pools, launch_mean_queries

    g, expansions, pool = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, h, g.length, 40, generator=generator) for h in (4, 2, 2))
    q, k, v = q * 2, k + 3 * torch.randn(1, 2, 1, 40, generator=generator), v + 2
    q, k, v = (x.to(dtype) for x in (q, k, v))
    tables = torch.stack([torch.randperm(g.grid_tokens, generator=generator) for _ in range(3)]).int()
    orders = torch.tensor([2, 0], dtype=torch.int32)
    bias = None
    if biased:
        bias = torch.randn(2, g.length, generator=generator)
        bias[:, g.prefix + tables[2, 64:128].long()] = -torch.inf
    stretches, count = stretches_of(g, expansions), -(-g.grid_tokens // pool)
    means = torch.empty(8, stretches, 64, dtype=dtype) if expansions else None
    keys, values = (torch.full((8, stretches, count, 64), torch.nan) for _ in range(2))
    weight = torch.full((8, stretches, count), torch.nan)
    inputs = AttentionInputs(q, k, v, g, tables[orders].repeat_interleave(2, 0), scale=0.2, key_bias=bias)
    launch_expanded_pools(inputs, PoolBuffers(keys, values, weight, means), pool)
    if expansions:
        of_key_heads = torch.full_like(means, torch.nan)
        launch_mean_queries(q, g, tables, orders, of_key_heads, table_group=2)
        assert torch.equal(of_key_heads, means)
    for entry in range(8):
        batch, head = divmod(entry, 4)
        rows = tables[orders[head // 2]].long() + g.prefix
        its = (x[batch, h][rows][None, None].double() for x, h in ((q, head), (k, head // 2), (v, head // 2)))
        ordered_q, ordered_k, ordered_v = its
        mean = mean_queries(ordered_q, g, expansions)
        if expansions:
            assert relative_error(means[entry, :, :40], mean[0, 0]) < 1e-3
            mean = means[entry, :, :40].double()[None, None]
        ordered_bias = None if bias is None else bias[batch, rows][None, None]
        expected = expanded_pools(mean, ordered_k, ordered_v, pool, scale=0.2, key_bias=ordered_bias)
        bound = 1e-5 if dtype == torch.float32 else 1e-3
        assert relative_error(keys[entry, :, :, :40], expected.keys[0, 0]) < bound
        assert relative_error(values[entry, :, :, :40], expected.values[0, 0]) < bound
        found = weight[entry] * math.log(2)
        seen = expected.bias[0, 0] > -1e29
        assert (found[seen] - expected.bias[0, 0][seen]).abs().max() < 200 * bound
        assert (found[~seen] < -1e29).all() and found.isfinite().all()
