"""The correction by mean queries on hardware against its PyTorch reference in float64."""

import pytest
import torch
from comfyui_paro.kernels.api import add_corrections, query_corrections
from comfyui_paro.kernels.problem import Geometry, SparsePattern
from comfyui_paro.paro_runtime.correction import exact_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels on hardware are not tested"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "dim, block_q, rows, expansions, biased",
    [
        (128, 128, 128, 16, False),
        (128, 64, 8, 16, True),
        (64, 64, 64, 3, False),
        (72, 128, 16, 3, True),
        (64, 128, 64, 0, True),
        (128, 128, 8, 16, False),
    ],
)
@pytest.mark.parametrize("grid", [(5, 13, 11), (9, 40, 37)])
def test_corrections(grid, dim, block_q, rows, expansions, biased, dtype):
    g = Geometry(70, grid, 7, block_q)
    q, k, v = (torch.randn(2, n, g.length, dim, device="cuda") for n in (4, 2, 2))
    q += 2 * torch.randn(2, 4, 1, dim, device="cuda")
    v[..., 0] += torch.linspace(0, 3, g.length, device="cuda")
    # As a fused projection leaves them: [B, L, H, D].
    q, k, v = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    tables = torch.stack([torch.randperm(g.grid_tokens, device="cuda") for _ in range(2)]).int()
    order_of_head = torch.tensor([1, 0], dtype=torch.int32, device="cuda")
    # Queries that follow each other have something in common, and other things further on.
    growing = torch.linspace(-2, 2, g.grid_tokens, device="cuda")[:, None] * torch.randn(dim, device="cuda")
    for head in range(4):
        q[:, head, tables[1 - head // 2].long() + g.prefix] += growing.to(dtype)
    mask = torch.rand(4, g.q_blocks, g.k_blocks, device="cuda") < 0.3
    mask[:, :, 0] = True
    tail = 0.5 + torch.rand(4, device="cuda")
    pattern = SparsePattern.from_mask(g, tables, order_of_head, mask, tail, 64, expansions)
    bias = None
    if biased:
        bias = torch.randn(2, g.length, device="cuda")
        bias[:, tables[0, 64:128].long() + g.prefix] = -torch.inf
    heads = torch.tensor([3, 0, 1], dtype=torch.int32, device="cuda")
    rest = {"rows": rows, "key_bias": bias}
    found = query_corrections(q, k, v, pattern, heads, backend="triton", **rest)
    expected = query_corrections(*(x.double() for x in (q, k, v)), pattern, heads, backend="reference", **rest)
    worst = ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()
    assert worst < (3e-3 if dtype == torch.float16 else 2e-2), worst

    shares, out = torch.rand(4, device="cuda"), torch.randn_like(q)
    flag = torch.zeros(4, dtype=torch.int32, device="cuda")
    # As they are made, and as they are kept for later steps.
    for its in (found, found.to(dtype)):
        given = [
            add_corrections(out.clone(), its, shares, pattern, heads, rows=rows, nonfinite=flag, backend=backend)
            for backend in ("triton", "reference")
        ]
        # Both round once.
        assert (given[0].float() - given[1].float()).abs().max() <= (4e-2 if dtype == torch.bfloat16 else 4e-3)
        assert torch.equal(given[0][:, 2], out[:, 2]) and not flag.any()


def test_exact_rows():
    q, k, v = (torch.randn(2, n, 700, 64, device="cuda", dtype=torch.bfloat16) for n in (6, 2, 2))
    bias = torch.randn(2, 700, device="cuda")
    rows = torch.stack([torch.randperm(700, device="cuda")[:70] for _ in range(6)])
    found = exact_rows(q, k, v, rows, scale=0.1, key_bias=bias).double()
    logits = q.double() @ k.double().repeat_interleave(3, 1).transpose(2, 3) * 0.1 + bias.double()[:, None, None]
    dense = logits.softmax(3) @ v.double().repeat_interleave(3, 1)
    expected = dense.gather(2, rows[None, :, :, None].expand(2, -1, -1, 64))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-2
