"""The statistics kernels in the interpreter against the streaming PyTorch reference."""

from __future__ import annotations

import pytest
import torch
from comfyui_paro.kernels.core.inputs import ScoreInputs
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.support import interpreted
from comfyui_paro.kernels.statistics.api import block_statistics, row_logsumexp

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
    got, expected = (row_logsumexp(ScoreInputs(q, k, key_bias=bias), name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "geometry, options",
    [
        (Geometry(3, (2, 5, 17), 1), {}),
        (Geometry(0, (1, 8, 24), 0), {"epsilon": 5e-3}),
        (Geometry(3, (2, 5, 17), 70), {"epsilon": 5e-3, "q_blocks": torch.tensor([0, 2])}),
        (Geometry(1, (1, 10, 31), 0, block_q=128), {"epsilon": 5e-3}),
    ],
)
@pytest.mark.parametrize("shape", [{}, {"heads": 4, "batch": 2}])
def test_block_statistics(geometry: Geometry, options: dict, shape: dict):
    q, k, rows = make(geometry, **shape)
    lse = row_logsumexp(ScoreInputs(q, k), "reference")
    got, expected = (
        block_statistics(ScoreInputs(q, k), lse, geometry, rows, backend=name, **options)
        for name in ("triton", "reference")
    )
    for name in ("mass", "maximum", "small"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("epsilon", [None, 5e-3])
@pytest.mark.parametrize("block_q", [64, 128])
def test_two_key_blocks_at_a_time_as_on_data_centre_gpus(block_q, epsilon, monkeypatch):
    """An odd number of key blocks, heads in more than one group, a batch."""
    from comfyui_paro.kernels.statistics import triton_statistics

    wide = triton_statistics.statistics_tile((9, 0), 64, wide=False)
    assert wide.keys == 128
    monkeypatch.setattr(triton_statistics, "tile_of", lambda q: wide)
    monkeypatch.setattr(triton_statistics, "REORDER_BYTES", 1)
    geometry = Geometry(3, (2, 5, 29), 1, block_q=block_q)
    assert geometry.k_blocks % 2
    q, k, rows = make(geometry, heads=4, batch=2, dtype=torch.float16)
    lse, expected_lse = (row_logsumexp(ScoreInputs(q, k), name) for name in ("triton", "reference"))
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-5)
    got, expected = (
        block_statistics(ScoreInputs(q, k), lse, geometry, rows, epsilon=epsilon, backend=name)
        for name in ("triton", "reference")
    )
    for name in ("mass", "maximum", "small") if epsilon else ("mass",):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=2e-4, rtol=1e-4)


def test_row_logsumexp_of_some_rows():
    q, k, _ = make(Geometry(3, (2, 5, 17), 1), heads=4, batch=2)
    some = torch.tensor([5, 0, 99])
    for name in ("triton", "reference"):
        every = row_logsumexp(ScoreInputs(q, k), name)
        torch.testing.assert_close(row_logsumexp(ScoreInputs(q[:, :, some], k), name), every[:, :, some])
