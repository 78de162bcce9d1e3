"""What one attention call costs beside its kernels: launches, torch operations, scratch memory, and the plan of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfyui_paro.kernels.attention import block_list_layout, launch_plan
from comfyui_paro.kernels.attention.api import sparse_attention
from comfyui_paro.kernels.core import scratch
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.pattern import SparsePattern
from comfyui_paro.kernels.core.precision import PRECISIONS, Precision
from comfyui_paro.kernels.core.support import interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import Case, make, oracle, relative_error

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from comfyui_paro.kernels.attention import launch, triton_block_lists
from comfyui_paro.kernels.pooling import triton_pools

KERNELS = ("channel_statistics", "finish_statistics", "prepare_keys_values", "attention_forward")
OF_POOLS = ("mean_queries", "store_pools")
WAN_720P = launch_plan.CallKey(
    1, 40, 1, 128, torch.bfloat16, (9, 0), Geometry(0, (21, 45, 80), 0, 128), PRECISIONS["fp8"], 64,
    True, False, True, True, expansions=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_plans():
    launch_plan.call_of.cache_clear()
    launch_plan.parts_of.cache_clear()
    scratch.release_scratch()
    yield
    launch_plan.call_of.cache_clear()
    launch_plan.parts_of.cache_clear()


class Operations(TorchDispatchMode):
    """Names of the torch operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The kernels' names in the order of their launches; nothing runs."""
    names = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: names.append(self.name)

    for name in (*KERNELS, "store_pools"):
        monkeypatch.setattr(launch, name, Kernel(name))
    monkeypatch.setattr(triton_block_lists, "list_blocks", Kernel("list_blocks"))
    monkeypatch.setattr(triton_pools, "_mean_queries", Kernel("mean_queries"))
    return names


def expected_launches(*names: str, tail: bool = True) -> list[str]:
    """The names with what makes the pools of a tail."""
    return [*names[:-1], *(OF_POOLS if tail else ()), names[-1]]


def problem(tokens: int, heads: int = 2, tail: bool = True, expansions: int = 16):
    g = Geometry(64, (1, 64, tokens // 64), 0, 64)
    q, k, v = (torch.zeros(1, g.length, heads, 64, dtype=torch.float16).transpose(1, 2) for _ in range(3))
    mask = torch.rand(heads, g.q_blocks, g.k_blocks) < 0.3
    tables = torch.arange(tokens, dtype=torch.int32)[None]
    order_of_head = torch.zeros(heads, dtype=torch.int32)
    return q, k, v, SparsePattern.from_mask(
        g, tables, order_of_head, mask, torch.zeros(heads) if tail else None, expansions=expansions
    )  # fmt: skip


def test_lists_too_large_to_be_kept_are_one_launch_more(launches, monkeypatch):
    monkeypatch.setattr(block_list_layout, "LARGEST_KEPT_LIST", 0)
    q, k, v, pattern = problem(16384)
    for _ in range(2):
        launches.clear()
        with Operations() as operations:
            sparse_attention(q, k, v, pattern, PRECISIONS["fp8"], backend="triton")
    assert launches == expected_launches("list_blocks", *KERNELS)
    assert operations.names == ["aten.empty_strided.default"]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("precision, tokens, expected", [
    ("16bit", 4096, ["prepare_keys_values", "attention_forward"]),
    ("int8", 4096, ["channel_statistics", "prepare_keys_values", "attention_forward"]),
    ("fp8", 4096, ["channel_statistics", "prepare_keys_values", "attention_forward"]),
    ("fp8", 16384, list(KERNELS)),
    ("int4", 4096, list(KERNELS)),
])  # fmt: skip
def test_a_call_is_its_launches_and_one_allocation(launches, precision: str, tokens: int, expected, tail: bool):
    q, k, v, pattern = problem(tokens, tail=tail)
    sparse_attention(q, k, v, pattern, PRECISIONS[precision], backend="triton")
    launches.clear()
    with Operations() as operations:
        sparse_attention(q, k, v, pattern, PRECISIONS[precision], backend="triton")
    assert launches == expected_launches(*expected, tail=tail)
    assert operations.names == ["aten.empty_strided.default"]


def test_a_call_in_groups_slices_and_no_more(launches, monkeypatch):
    q, k, v, pattern = problem(4096, heads=8)
    monkeypatch.setattr(scratch, "BUDGET", 3 << 20)
    sparse_attention(q, k, v, pattern, PRECISIONS["fp8"], backend="triton")
    launches.clear()
    with Operations() as operations:
        sparse_attention(q, k, v, pattern, PRECISIONS["fp8"], backend="triton")
    assert launches.count("attention_forward") == 2
    assert set(operations.names) == {"aten.empty_strided.default", "aten.slice.Tensor"}
    assert scratch.scratch_bytes() <= 3 << 20


def test_the_result_lies_as_the_queries_do():
    q, k, v, pattern, _ = make(Case("", grid=(1, 7, 11)))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert sparse_attention(q, k, v, pattern, PRECISIONS["int8"], backend="triton").is_contiguous()
    for backend in ("triton", "reference"):
        out = sparse_attention(*views, pattern, PRECISIONS["int8"], backend=backend)
        assert out.transpose(1, 2).is_contiguous()


def test_an_output_whose_channels_are_apart_is_written_as_well():
    q, k, v, pattern, _ = make(Case("", grid=(1, 7, 11)))
    out = torch.full((*q.shape, 2), torch.nan, dtype=q.dtype)[..., 0]
    assert sparse_attention(q, k, v, pattern, PRECISIONS["int8"], out=out, backend="triton") is out
    assert relative_error(out, oracle(q, k, v, pattern)) < 1.5e-2


@pytest.mark.parametrize("precision", ["int8", "fp8", "16bit"])
def test_statistics_finished_apart_are_the_same_bits(precision: str, monkeypatch):
    dtype = torch.float32 if precision == "16bit" else torch.float16
    case = Case("", grid=(3, 16, 16), suffix=3, tail=True, heads=4, kv_heads=2, batch=2, dtype=dtype)
    q, k, v, pattern, _ = make(case)
    together = sparse_attention(q, k, v, pattern, PRECISIONS[precision], backend="triton")
    monkeypatch.setattr(launch_plan, "FEW_CHUNKS", 0)
    launch_plan.call_of.cache_clear()
    launch_plan.parts_of.cache_clear()
    apart = sparse_attention(q, k, v, pattern, PRECISIONS[precision], backend="triton")
    assert torch.equal(together, apart)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("hadamard", [False, True])
def test_statistics(every: int, hadamard: bool, monkeypatch):
    """Mean key (of every `every`-th block of 64 rows, rotated) and scales of V; more chunks than are added at once."""
    monkeypatch.setattr(launch_plan, "STATISTICS_CHUNK", 64 * every)
    monkeypatch.setattr(launch_plan, "FEW_CHUNKS", 0)
    if every > 1:
        monkeypatch.setattr(launch_plan, "KEY_SAMPLE_FROM", 0)
    q, k, v, pattern, _ = make(Case("", grid=(3, 20, 22), suffix=3, dim=72, dtype=torch.float32))
    precision = Precision("int8", "int8", hadamard)
    (piece,) = launch.pieces_of(q, k, v, torch.empty_like(q), pattern, precision)
    prepared = launch.prepare(piece, pattern, 0.1)
    sampled = (torch.arange(k.shape[2]) // 64) % every == 0
    mean = k[0, :, sampled].double().mean(1)
    if hadamard:
        mean = mean @ launch_plan.hadamard_matrix(72, dtype=torch.float64)
    torch.testing.assert_close(prepared["k_means"][:, :72], mean.float())
    torch.testing.assert_close(prepared["v_scales"][:, :72], v[0].abs().amax(1) / 127)


def test_scratch_of_a_large_call_stays_within_the_budget():
    parts = launch_plan.parts_of(WAN_720P, 40)
    assert [part.kv for part in parts] == [slice(first, first + 8) for first in range(0, 40, 8)]
    assert all(part.call.scratch.bytes <= scratch.BUDGET for part in parts)
    assert parts[0].call.scratch.bytes > 0.7 * scratch.BUDGET
    # A third of what the queries alone take.
    assert scratch.BUDGET < 40 * 75600 * 128 * 2 / 2.8


def test_groups_cover_every_head_once(monkeypatch):
    key = replace(WAN_720P, kv_heads=7, group=3)
    for budget in (1, 30 << 20, 70 << 20, 130 << 20, 1 << 40):
        monkeypatch.setattr(scratch, "BUDGET", budget)
        launch_plan.parts_of.cache_clear()
        for most in (1, 3, 7):
            parts = launch_plan.parts_of(key, most)
            if len(parts) == 1:
                assert parts[0].kv is None and most == 7
                continue
            assert [h for part in parts for h in range(7)[part.kv]] == list(range(7))
            assert [h for part in parts for h in range(21)[part.rows]] == list(range(21))
            assert all(len(range(7)[part.kv]) in (1, most) or part.call.scratch.bytes <= budget for part in parts)


def test_heads_in_groups_give_the_same_bits(monkeypatch):
    q, k, v, pattern, bias = make(Case("", grid=(2, 7, 11), prefix=5, tail=True, bias=True, heads=10, kv_heads=5))
    whole = sparse_attention(q, k, v, pattern, PRECISIONS["int8"], key_bias=bias, backend="triton")
    monkeypatch.setattr(scratch, "BUDGET", 1)
    launch_plan.parts_of.cache_clear()
    scratch.release_scratch()
    alone = sparse_attention(q, k, v, pattern, PRECISIONS["int8"], key_bias=bias, backend="triton")
    assert torch.equal(alone, whole)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 60000.0])
def test_the_kernel_tells_of_what_is_not_finite(backend: str, value: float):
    """16-bit values: infinity, no number, and finite ones whose sum is finite."""
    q, k, v, pattern, _ = make(Case("", grid=(1, 7, 11), mask=None))
    v[0, 1, 40, 3] = value
    flag = torch.zeros(4, dtype=torch.int32)
    out = sparse_attention(q, k, v, pattern, PRECISIONS["16bit"], nonfinite=flag, backend=backend)
    assert flag.tolist() == [int(not out.isfinite().all()), 0, 0, 0]
    assert bool(flag[0]) == (value != 60000.0)
