"""The statistics kernels in the interpreter against the streaming PyTorch reference."""

from __future__ import annotations

import pytest
import torch
from comfyui_paro.kernels.api import block_statistics, row_logsumexp
from comfyui_paro.kernels.problem import Geometry
from comfyui_paro.kernels.support import interpreted

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)


def make(geometry: Geometry, heads=2, kv_heads=2, batch=1, dim=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, geometry.length, dim, generator=generator).to(dtype)
    k = torch.randn(batch, kv_heads, geometry.length, dim, generator=generator).to(dtype)
    rows = torch.stack([torch.randperm(geometry.grid_tokens, generator=generator) for _ in range(heads)])
    return q, k, rows


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dim, dtype", [(64, torch.float32), (72, torch.float16)])
def test_row_logsumexp(biased: bool, dim: int, dtype: torch.dtype):
    q, k, _ = make(Geometry(3, (2, 5, 17), 1), heads=4, batch=2, dim=dim, dtype=dtype)
    bias = None
    if biased:
        bias = torch.zeros(2, q.shape[2])
        bias[1, :3] = -torch.inf
    got, expected = (row_logsumexp(q, k, key_bias=bias, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "geometry, options",
    [
        (Geometry(3, (2, 5, 17), 1), {}),
        (Geometry(0, (1, 8, 24), 0), {"epsilon": 5e-3, "pool": 64}),
        (Geometry(3, (2, 5, 17), 70), {"epsilon": 5e-3, "pool": 16, "q_blocks": torch.tensor([0, 2])}),
        (Geometry(1, (1, 10, 31), 0, block_q=128), {"epsilon": 5e-3, "pool": 32}),
    ],
)
@pytest.mark.parametrize("shape", [{}, {"heads": 4, "batch": 2}])
def test_block_statistics(geometry: Geometry, options: dict, shape: dict):
    q, k, rows = make(geometry, **shape)
    lse = row_logsumexp(q, k, backend="reference")
    got, expected = (
        block_statistics(q, k, lse, geometry, rows, backend=name, **options) for name in ("triton", "reference")
    )
    for name in ("mass", "maximum", "small", "pooled"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
