"""The Triton attention in the interpreter (or on a GPU), against a float64 oracle, over a table of edge cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.attention.api import sparse_attention
from comfyui_paro.kernels.attention.reference import sparse_attention_reference
from comfyui_paro.kernels.core.precision import PRECISIONS, Precision
from comfyui_paro.kernels.core.scratch import allocate
from comfyui_paro.kernels.core.support import interpreted

from .cases import CASES, Case, make, oracle, relative_error

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from comfyui_paro.kernels.attention.launch import launch_attention, pieces_of
from comfyui_paro.kernels.attention.tiles import Tile, in_channel_halves

# Relative L2 against float64. Triton's interpreter casts fp32 to fp8 wrongly (no carry into the next binade), which
# doubles the fp8 error that a GPU shows.
BOUNDS = {"16bit": 2e-3, "int8": 1.5e-2, "int8_pv8": 2.5e-2, "fp8": 9e-2, "int4": 2.5e-1, "int4_pv4": 4e-1}
PAIRS, SINGLE = Tile(64, True, 4, 2), Tile(64, False, 4, 2)


def run(case: Case, precision: str, tile: Tile = PAIRS):
    q, k, v, pattern, bias = make(case)
    # Poisoned: every element must be written. [B, L, H, D] storage, as the host wants it.
    out = torch.full((case.batch, q.shape[2], case.heads, case.dim), torch.nan, dtype=q.dtype).transpose(1, 2)
    launch_attention(q, k, v, pattern, PRECISIONS[precision], key_bias=bias, out=out, tile=tile)
    return out, oracle(q, k, v, pattern, bias)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_edge_case(case: Case):
    out, expected = run(case, "int8", PAIRS if len(case.name) % 2 else SINGLE)
    # Rounding is a share of the scores.
    assert relative_error(out, expected) < BOUNDS["int8"] * case.sigma


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dim", [64, 128])
def test_precision(precision: str, dim: int):
    out, expected = run(Case("", grid=(2, 8, 13), suffix=5, tail=True, dim=dim, heads=1, kv_heads=1), precision)
    assert relative_error(out, expected) < BOUNDS[precision]


@pytest.mark.parametrize("case", [
    Case("int8", batch=2, heads=2, kv_heads=1, suffix=3),
    Case("int8", grid=(3, 11, 13), block_q=128, prefix=5, bias=True, expansions=3),
    Case("16bit", pool=16, dim=32, heads=4, expansions=2),
    Case("16bit", dtype=torch.float32, bias=True, expansions=3),
    Case("int4", dim=72, heads=2, kv_heads=1, bias=True, expansions=3),
    Case("int4", expansions=0),
    Case("rotated", dtype=torch.float32),
], ids=lambda case: f"{case.name} {case.expansions}")  # fmt: skip
def test_the_tail_alone(case: Case):
    """Every row with one kept block, queries that differ from stretch to stretch and from head to head.

    Against the reference, which rounds as the kernels do: with the pools of another stretch or query head, or with
    another bias, the error is above 0.05.
    """
    q, k, v, pattern, bias = make(replace(case, tail=True, orders="axes", mask=0.0, drift=3.0))
    qk = PRECISIONS.get(case.name, PRECISIONS["int8"]).qk
    precision = Precision(qk, "16", case.name in ("int4", "rotated"))
    # What lies in the scratch memory, also behind the last pool, is no number before the call.
    (piece,) = pieces_of(q, k, v, torch.empty_like(q), pattern, precision, biased=case.bias)
    for tensor in allocate(piece.call.scratch, q.device).values():
        tensor.view(torch.uint8).fill_(255)
    out = launch_attention(q, k, v, pattern, precision, key_bias=bias)
    expected = sparse_attention_reference(q, k, v, pattern, precision, key_bias=bias)
    # A number at the edge of a step may round the other way, and a step of 4 bits is large.
    assert relative_error(out, expected) < (1e-2 if qk == "int4" else 2e-3)


@pytest.mark.parametrize("precision", ["16bit", "int8_pv8", "int4_pv4"])
def test_single_blocks_in_other_precisions(precision: str):
    out, expected = run(Case("", prefix=3, tail=True), precision, SINGLE)
    assert relative_error(out, expected) < BOUNDS[precision]


@pytest.mark.parametrize("pv", ["16", "int8", "fp8"])
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_rotation_tames_channels_that_differ_from_token_to_token(dim: int, pv: str):
    """Smooth-K cannot: it takes away what all tokens share."""
    q, k, v, pattern, _ = make(Case("", grid=(2, 8, 13), suffix=5, tail=True, dim=dim, heads=1, kv_heads=1))
    k[..., ::20] *= 8
    exact = oracle(q, k, v, pattern)
    errors = [
        relative_error(launch_attention(q, k, v, pattern, Precision("int8", pv, rotate), tile=PAIRS), exact)
        for rotate in (False, True)
    ]
    reference = sparse_attention_reference(q, k, v, pattern, Precision("int8", pv, True))
    # The interpreter casts to FP8 worse than rotation can make good; see BOUNDS.
    assert errors[1] < (0.7 * errors[0] if pv != "fp8" else BOUNDS["fp8"])
    assert errors[1] < relative_error(reference, exact) + (5e-3 if pv != "fp8" else BOUNDS["fp8"])


@pytest.mark.parametrize("precision", ["16bit", "int8", "int8_pv8", "fp8"])
def test_fewer_rows_than_channels_are_done_in_halves_of_channels(precision: str):
    out, expected = run(Case("", grid=(2, 8, 13), suffix=5, tail=True, dim=128, heads=1, kv_heads=1), precision, SINGLE)
    assert in_channel_halves((8, 0), SINGLE, 128, PRECISIONS[precision])
    assert relative_error(out, expected) < BOUNDS[precision]


@pytest.mark.parametrize("sigma", [6.0, 25.0])
@pytest.mark.parametrize("tile", [PAIRS, SINGLE])
def test_large_scores_do_not_wrap_int8_weights(sigma: float, tile: Tile):
    """127 at the row's maximum must not round up to 128, which wraps to -128 (error above 1)."""
    q, k, v, pattern, _ = make(Case("", mask=None, sigma=sigma, heads=1, kv_heads=1, dim=128))
    out = launch_attention(q, k, v, pattern, PRECISIONS["int8_pv8"], tile=tile)
    same_scores = launch_attention(q, k, v, pattern, PRECISIONS["int8"], tile=tile)
    assert relative_error(out, same_scores) < 4e-2


def test_rows_of_128():
    out, expected = run(Case("", block_q=128, grid=(3, 10, 11), tail=True, prefix=9), "int8", Tile(128, True, 8, 2))
    assert relative_error(out, expected) < BOUNDS["int8"]


def test_small_tiles_share_a_row_of_wide_blocks():
    out, expected = run(Case("", block_q=128, grid=(1, 7, 11), mask="one", tail=True), "int8")
    assert relative_error(out, expected) < BOUNDS["int8"]


def test_scale_is_the_callers():
    q, k, v, pattern, _ = make(Case("", mask=None))
    out = sparse_attention(q, k, v, pattern, PRECISIONS["16bit"], scale=0.25, backend="triton")
    expected = oracle(q * (0.25 * q.shape[3] ** 0.5), k, v, pattern)
    assert relative_error(out, expected) < 3e-3


@pytest.mark.parametrize("precision", ["16bit", "int8"])
def test_float32_values_beyond_the_range_of_fp16(precision: str):
    q, k, v, pattern, _ = make(Case("", dtype=torch.float32, heads=1, kv_heads=1, tail=True))
    v = v * 1e6
    if precision == "16bit":
        q, k = q * 1e5, k * 1e-5
    out = sparse_attention(q, k, v, pattern, PRECISIONS[precision], backend="triton")
    assert relative_error(out, oracle(q, k, v, pattern)) < BOUNDS[precision]


def test_same_bits_every_time():
    case = Case("", tail=True, suffix=3)
    first, _ = run(case, "int8_pv8")
    second, _ = run(case, "int8_pv8")
    assert torch.equal(first, second)


def test_bfloat16_is_declined_in_the_interpreter():
    q, k, v, pattern, _ = make(replace(CASES[0], dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bf16"):
        sparse_attention(q, k, v, pattern, PRECISIONS["int8"], backend="triton")
