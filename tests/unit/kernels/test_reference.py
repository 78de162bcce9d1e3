"""The PyTorch reference against an independent float64 oracle that forms the whole token mask."""

import math

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.attention.patterns import build_pattern
from comfyui_paro.paro_runtime.plan.orders import AXIS_ORDERS, order_table
from comfyui_paro.tests.sparse_call import sparse_attention

# prefix, grid, suffix, block_q: what each guards
LAYOUTS = [
    (0, (5, 7, 9), 0, 64),  # ragged last block, no context
    (77, (3, 17, 11), 0, 64),  # context longer than a block, prime sides
    (3, (1, 16, 20), 5, 64),  # an image with context on both sides
    (1, (4, 8, 8), 0, 128),  # whole blocks, tall query blocks
]


def oracle(q, k, v, layout, orders, mask, block_q, tail_bias=None, key_bias=None, pool=64):
    """Attention in float64, token by token: which keys a query sees is looked up, nothing is reordered."""
    q, k, v = (t.double() for t in (q, k, v))
    batch, heads, length, dim = q.shape
    out = torch.zeros_like(q)
    n = layout.grid_tokens
    for h in range(heads):
        table = order_table(orders[h], layout.grid).long()
        position = torch.empty(n, dtype=torch.long)
        position[table] = torch.arange(n)
        for b in range(batch):
            scores = q[b, h] @ k[b, h].T / math.sqrt(dim)
            if key_bias is not None:
                scores = scores + key_bias[b].double()
            grid = slice(layout.prefix, layout.prefix + n)
            seen = mask[h][position // block_q][:, position // 64]
            scores[grid, grid] = scores[grid, grid].masked_fill(~seen, -math.inf)
            values = v[b, h]
            if tail_bias is not None:
                extra, extra_values = [], []
                for first in range(0, n, pool):
                    members = table[first : first + pool] + layout.prefix
                    column = q[b, h] @ k[b, h][members].mean(0) / math.sqrt(dim) + math.log(len(members))
                    column = column + tail_bias[h].double()
                    shown = torch.zeros(length, dtype=torch.bool)
                    shown[grid] = ~mask[h][position // block_q, first // 64]
                    extra.append(column.masked_fill(~shown, -math.inf))
                    extra_values.append(v[b, h][members].mean(0))
                scores = torch.cat([scores, torch.stack(extra, 1)], 1)
                values = torch.cat([values, torch.stack(extra_values)])
            out[b, h] = scores.softmax(1) @ values
    return out


def random_problem(layout, block_q, heads=2, dim=32, batch=2, dtype=torch.float32):
    q, k, v = (torch.randn(batch, heads, layout.length, dim, dtype=dtype) for _ in range(3))
    mask = torch.rand(heads, -(-layout.grid_tokens // block_q), -(-layout.grid_tokens // 64)) < 0.5
    mask[..., 0] = True  # every row keeps a block
    return q, k, v, mask


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("prefix, grid, suffix, block_q", LAYOUTS)
def test_sparse_attention_matches_the_oracle(prefix, grid, suffix, block_q, tail):
    layout = TokenLayout(prefix, grid, suffix)
    q, k, v, mask = random_problem(layout, block_q)
    orders = ("HWF", "WFH")
    bias = torch.tensor([0.3, -0.7]) if tail else None
    arguments = {"layout": layout, "orders": orders, "mask": mask, "tail_bias": bias, "block_q": block_q}
    out = sparse_attention(q, k, v, precision="16bit", backend="reference", **arguments)
    expected = oracle(q, k, v, layout, orders, mask, block_q, bias)
    assert (out - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("order", AXIS_ORDERS)
@pytest.mark.parametrize("grid", [(5, 7, 9), (3, 17, 11), (1, 13, 19)])
def test_full_density_at_16_bit_is_dense_attention_in_every_order(order, grid):
    layout = TokenLayout(4, grid, 3)
    q, k, v, mask = random_problem(layout, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for full in (None, torch.ones_like(mask)):
        out = sparse_attention(
            q, k, v, layout=layout, orders=(order,) * 2, mask=full, precision="16bit", backend="reference"
        )
        assert (out - expected).abs().max() < 5e-6


def test_a_key_bias_hides_keys_and_shifts_others():
    layout = TokenLayout(20, (2, 9, 9), 6)
    q, k, v, mask = random_problem(layout, 64)
    bias = torch.zeros(2, layout.length)
    bias[0, 5:20] = -math.inf
    bias[1, -6:] = 1.5
    arguments = {"layout": layout, "orders": ("FWH", "HFW"), "mask": mask}
    out = sparse_attention(q, k, v, precision="16bit", key_bias=bias, backend="reference", **arguments)
    expected = oracle(q, k, v, layout, ("FWH", "HFW"), mask, 64, key_bias=bias)
    assert (out - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(
    "precision, bound", [("int8", 1.5e-2), ("int8_pv8", 2.5e-2), ("fp8", 4.5e-2), ("int4", 0.3), ("int4_pv4", 0.4)]
)
def test_quantisation_costs_little_even_with_channel_outliers_in_k(precision, bound):
    layout = TokenLayout(0, (6, 8, 8))
    q, k, v, mask = random_problem(layout, 64, dim=64)
    k = k + torch.zeros(64).index_fill(0, torch.tensor([3, 17]), 12.0)
    exact = oracle(q, k, v, layout, ("FHW", "WHF"), mask, 64)
    out = sparse_attention(
        q, k, v, layout=layout, orders=("FHW", "WHF"), mask=mask, precision=precision, backend="reference"
    )
    assert (out - exact).norm() / exact.norm() < bound


def test_grouped_query_heads_share_keys():
    layout = TokenLayout(0, (3, 8, 9))
    q, k, v, mask = random_problem(layout, 64, heads=4)
    orders = ("HWF", "HWF", "WFH", "WFH")
    grouped = sparse_attention(
        q, k[:, ::2], v[:, ::2], layout=layout, orders=orders, mask=mask, precision="16bit", backend="reference"
    )
    repeated = (t[:, ::2].repeat_interleave(2, 1) for t in (k, v))
    expected = oracle(q, *repeated, layout, orders, mask, 64)
    assert (grouped - expected).norm() / expected.norm() < 1e-5
    with pytest.raises(ValueError, match="share its order"):
        build_pattern(layout, AXIS_ORDERS[:4], mask, None, kv_heads=2)


# what is wrong with the call, and the word its one line must hold
WRONG_CALLS = [
    (lambda q, k, v, m: (q[:, :, 1:], k, v, m), "length"),
    (lambda q, k, v, m: (q, k, v, m[:, :-1]), "mask"),
    (lambda q, k, v, m: (q, k, v, m.float()), "mask"),
    (lambda q, k, v, m: (q.half(), k, v, m), "dtype"),
    (lambda q, k, v, m: (q[0], k, v, m), r"\[B, H, L, D\]"),
    (lambda q, k, v, m: (q, k[..., :16], v[..., :16], m), "fit together"),
]


@pytest.mark.parametrize("change, word", WRONG_CALLS)
def test_a_call_that_does_not_fit_is_refused_with_one_line(change, word):
    layout = TokenLayout(0, (3, 8, 9))
    q, k, v, mask = change(*random_problem(layout, 64))
    with pytest.raises(ValueError, match=word) as error:
        sparse_attention(q, k, v, layout=layout, orders=("FHW", "FHW"), mask=mask, backend="reference")
    assert "\n" not in str(error.value)
