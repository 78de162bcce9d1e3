"""4-bit keys two a byte: the same numbers as one a byte, exactly, and half the memory."""

from __future__ import annotations

import pytest
import torch
from comfyui_paro.kernels.attention import launch_plan
from comfyui_paro.kernels.attention.reference import sparse_attention_reference
from comfyui_paro.kernels.core.precision import PRECISIONS, Precision
from comfyui_paro.kernels.core.support import interpreted

from .cases import Case, make, relative_error

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from comfyui_paro.kernels.attention import launch
from comfyui_paro.kernels.attention.tiles import Tile

INT4 = PRECISIONS["int4"]


@pytest.fixture
def unpacked(monkeypatch):
    """Call it to store one value a byte from here on."""

    def store():
        monkeypatch.setattr(launch_plan, "packs", lambda precision, padded: False)
        launch_plan.call_of.cache_clear()
        launch_plan.parts_of.cache_clear()

    launch_plan.call_of.cache_clear()
    launch_plan.parts_of.cache_clear()
    yield store
    launch_plan.call_of.cache_clear()
    launch_plan.parts_of.cache_clear()


def prepared(case: Case) -> dict[str, torch.Tensor]:
    q, k, v, pattern, _ = make(case)
    (piece,) = launch.pieces_of(q, k, v, torch.empty_like(q), pattern, INT4)
    return {name: tensor.clone() for name, tensor in launch.prepare(piece, pattern, case.dim**-0.5).items()}


def decoded(x: torch.Tensor) -> torch.Tensor:
    """`[..., D / 2]` packed bytes as `[..., D]` values, by the words of `triton_math.packed` alone."""
    return torch.cat([(x.int() & 15) - 8, x.int() >> 4], -1)


@pytest.mark.parametrize("dim", [64, 72, 128])
def test_bytes_hold_the_values(dim: int, unpacked):
    case = Case("", grid=(3, 10, 11), prefix=9, tail=True, dim=dim)
    two = prepared(case)
    unpacked()
    one = prepared(case)
    assert two["k"].numel() * 2 == one["k"].numel() and one["k"].unique().numel() == 15
    assert torch.equal(decoded(two["k"]), one["k"].int())
    pools = -(-330 // 64)
    assert torch.equal(decoded(two["pooled_k"])[:, :, :pools], one["pooled_k"].int()[:, :, :pools])
    assert one["pooled_k"][:, :, :pools].unique().numel() == 15
    torch.testing.assert_close(two["pool_bias"], one["pool_bias"])
    torch.testing.assert_close(two["k_scales"] * 16, one["k_scales"])
    torch.testing.assert_close(two["pooled_scales"][:, :, :pools] * 16, one["pooled_scales"][:, :, :pools])


@pytest.mark.parametrize("tile", [Tile(64, True, 4, 2), Tile(64, False, 4, 2)], ids=["pairs", "single"])
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_multiplies_the_values(tile: Tile, dim: int, bias: bool):
    """Against the reference, which rounds the same numbers to 4 bits; 16-bit weights add nothing of their own."""
    precision = Precision("int4", "16", hadamard=True)
    q, k, v, pattern, key_bias = make(Case("", grid=(3, 7, 11), prefix=5, tail=True, dim=dim, bias=bias))
    out = launch.launch_attention(q, k, v, pattern, precision, key_bias=key_bias, tile=tile)
    expected = sparse_attention_reference(q, k, v, pattern, precision, key_bias=key_bias)
    assert relative_error(out, expected) < 2e-3


def test_small_and_large_heads_stay_one_a_byte():
    assert [launch_plan.packs(INT4, padded) for padded in (32, 64, 128, 256)] == [False, True, True, False]
    assert not launch_plan.packs(PRECISIONS["int8"], 64)
