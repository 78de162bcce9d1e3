"""Which calls go to the Gluon kernel, and what happens when it cannot be launched. The kernel itself needs a GPU."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from comfyui_paro.kernels.attention import launch_plan
from comfyui_paro.kernels.attention.gluon_sm90 import launch as gluon_launch
from comfyui_paro.kernels.core.dispatch import served
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.precision import PRECISIONS
from comfyui_paro.kernels.core.support import Request, Target, interpreted, nvidia

from .cases import Case, make

pytest.importorskip("triton")

SERVED = Request(nvidia((9, 0)), torch.bfloat16, 128, PRECISIONS["fp8"], "tail", 128)


@pytest.fixture(autouse=True)
def verified(monkeypatch):
    """A verified Triton, nothing forbidden, no plan left over."""
    monkeypatch.setattr(gluon_launch, "_importable", lambda: True)
    monkeypatch.setattr(gluon_launch, "_forbidden", None)
    monkeypatch.setattr(gluon_launch, "_held", False)
    monkeypatch.setattr(gluon_launch, "_all", True)
    yield
    launch_plan.call_of.cache_clear()
    launch_plan.parts_of.cache_clear()


@pytest.mark.parametrize("other", [
    {}, {"head_dim": 64}, {"dtype": torch.float16}, {"precision": PRECISIONS["int8"]}, {"form": "list"},
    {"form": "dense", "block_q": 64}, {"form": "list", "pool": 32},
])  # fmt: skip
def test_served(other: dict):
    assert gluon_launch.why_not(SERVED._replace(**other)) is None


@pytest.mark.parametrize("other, word", [
    ({"target": nvidia((8, 9))}, "sm_90"), ({"target": nvidia((10, 0))}, "sm_90"),
    ({"target": Target("amd"), "precision": PRECISIONS["int8"]}, "sm_90"),
    ({"head_dim": 96}, "dimension 96"), ({"head_dim": 256}, "dimension 256"), ({"dtype": torch.float32}, "float32"),
    ({"precision": PRECISIONS["16bit"]}, "precision"), ({"precision": PRECISIONS["int8_pv8"]}, "precision"),
    ({"precision": PRECISIONS["int4"]}, "precision"), ({"precision": PRECISIONS["fp8"].rotated}, "precision"),
    ({"block_q": 64}, "64 rows"), ({"biased": True}, "bias"), ({"pool": 32}, "pools of 32"),
])  # fmt: skip
def test_left_to_triton(other: dict, word: str):
    """Whoever asks what serves the call is told why this kernel does not."""
    asked = SERVED._replace(**other)
    assert word in gluon_launch.why_not(asked)
    found = served(asked, launch_plan.KERNELS)
    assert (found.by, [*found.why_not]) == ("triton", ["gluon_sm90"]) and word in found.why_not["gluon_sm90"]


def test_what_serves_a_call_follows_what_is_wanted_now(monkeypatch):
    monkeypatch.setattr(gluon_launch, "_all", False)
    dense = SERVED._replace(form="dense")
    assert served(SERVED, launch_plan.KERNELS) == ("gluon_sm90", {})
    assert "faster" in served(dense, launch_plan.KERNELS).why_not["gluon_sm90"]
    gluon_launch.hold(True)
    assert served(SERVED, launch_plan.KERNELS).by == "triton"
    with gluon_launch.set_aside(False):
        assert served(SERVED, launch_plan.KERNELS).by == "gluon_sm90"
    gluon_launch.hold(False)
    gluon_launch.forbid("it was wrong")
    assert served(SERVED, launch_plan.KERNELS) == ("triton", {"gluon_sm90": "it was wrong"})
    old = served(SERVED._replace(target=nvidia((7, 5))), launch_plan.KERNELS)
    assert old.by == "reference" and "7.5" in old.reason and "sm_90" in old.why_not["gluon_sm90"]


@pytest.mark.parametrize(
    "version, verified", [("3.6.0", True), ("3.7.1+git1234", True), ("3.6.1", False), ("4.0.0", False)]
)
def test_only_verified_versions(monkeypatch, caplog, version: str, verified: bool):
    import triton

    monkeypatch.undo()
    monkeypatch.setattr(triton, "__version__", version)
    gluon_launch._importable.cache_clear()
    with caplog.at_level(logging.INFO):
        assert (gluon_launch.why_not(SERVED) is None) is verified
        gluon_launch.why_not(SERVED)
    gluon_launch._importable.cache_clear()
    assert len(caplog.records) == (not verified)


def test_the_plan_is_for_tiles_of_128_rows():
    key = launch_plan.CallKey(
        1, 2, 2, 128, torch.bfloat16, (9, 0), Geometry(70, (2, 8, 13), 0, 64), PRECISIONS["fp8"], 64,
        False, False, False, gluon=True,
    )  # fmt: skip
    plan = launch_plan.call_of(key)
    # Two tiles of the grid's 208 tokens and one of the context's 70, for each of four heads.
    assert plan.gluon and plan.attention_grid == (4 * 3,)
    assert "PADDED_D" not in plan.attention_options and plan.attention_options["num_warps"] == 4


@pytest.mark.parametrize("dim, name, form", [
    (128, "fp8", "dense"), (128, "fp8", "list"), (128, "int8", "tail"), (64, "fp8", "list"),
])  # fmt: skip
def test_the_faster_kernel_is_wanted(monkeypatch, dim: int, name: str, form: str):
    monkeypatch.setattr(gluon_launch, "_all", False)
    call = (dim, PRECISIONS[name], form)
    for gluon in (True, False):
        monkeypatch.setitem(gluon_launch.CHOICES, call, gluon_launch.Choice(gluon, "3, 4"))
        assert gluon_launch.why_unwanted(*call) == (
            None if gluon else "Triton's is faster (ms of Triton, of Gluon: 3, 4)"
        )
    gluon_launch.prefer_always(True)
    assert gluon_launch.why_unwanted(*call) is None
    gluon_launch.forbid("a comparison")
    assert gluon_launch.why_unwanted(*call) == "a comparison"


def test_what_the_table_does_not_know_is_not_wanted():
    assert gluon_launch.why_unwanted(96, PRECISIONS["fp8"], "list") is not None
    assert gluon_launch.why_unwanted(128, PRECISIONS["int8_pv8"], "list") is not None


triton_launches = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 before Triton is imported")


class Recorder:
    """In place of a kernel: notes its arguments, or fails."""

    def __init__(self, error: Exception | None = None):
        self.calls, self.error = [], error

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.calls.append((grid, arguments, options))
            if self.error:
                raise self.error

        return run


# Of `attention`; before the attention kernel.
BEFORE = ("channel_statistics", "finish_statistics", "prepare_keys_values", "store_pools")


@pytest.fixture
def kernels(monkeypatch):
    """(Gluon, Triton) attention kernels that run nothing, on a GPU of sm_90 that is none."""
    from comfyui_paro.kernels.attention import launch
    from comfyui_paro.kernels.attention.gluon_sm90 import forward as gluon_attention
    from comfyui_paro.kernels.pooling import triton_pools

    gluon, triton = Recorder(), Recorder()
    monkeypatch.setattr(launch, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(launch, "attention_forward", triton)
    for name in BEFORE:
        monkeypatch.setattr(launch, name, Recorder())
    monkeypatch.setattr(triton_pools, "_mean_queries", Recorder())
    names = gluon_attention.gluon_forward.arg_names
    monkeypatch.setattr(gluon_attention, "gluon_forward", gluon)
    gluon.names = names
    return gluon, triton


def attend(case: Case, precision: str = "fp8", **options):
    from comfyui_paro.kernels.attention.launch import launch_attention

    q, k, v, pattern, bias = make(case)
    return launch_attention(q, k, v, pattern, PRECISIONS[precision], key_bias=bias, **options)


SPARSE = Case("", dim=128, block_q=128, grid=(2, 10, 11), prefix=5, tail=True, heads=4, kv_heads=2)


@triton_launches
@pytest.mark.parametrize("mask, tail", [(0.5, True), (0.5, False), (None, False)])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_every_argument_of_the_kernel_is_passed(kernels, mask, tail: bool, precision: str):
    gluon, triton = kernels
    attend(
        Case("", dim=128, block_q=128, grid=(2, 10, 11), prefix=5, mask=mask, tail=tail, heads=4, kv_heads=2), precision
    )
    assert not triton.calls
    ((_, arguments, options),) = gluon.calls
    given = dict(zip(gluon.names, arguments, strict=False))
    assert gluon.names == [*given, *(name for name in gluon.names if name in options)]
    listed = mask is not None
    assert (options["LISTED"], options["TAIL"]) == (listed, listed and tail)
    assert (given["block_list"] is not None, given["pooled_v"] is not None) == (listed, listed and tail)
    assert given["K"].block_shape == [64, 128] and given["K"].shape[0] == 2 * 5 * 64
    assert given["V"].block_shape == ([128, 64] if precision == "fp8" else [64, 128])
    assert (given["v_scales"] is not None) == (precision == "fp8")
    assert (given["group"], given["k_blocks"], given["k_blocks_grid"], given["pools"]) == (2, 5, 4, 4)
    if listed and tail:
        # Two blocks of queries, each a stretch of its own; four heads.
        assert given["stretches"] == 2
        assert given["pooled_k"].shape == given["pooled_v"].shape == (4 * 2 * 64, 128)
        assert given["pool_bias"].shape == given["pool_scales"].shape == (4, 2, 64)


@pytest.mark.ordinary_tensors  # others do not tell whose memory they are a view of
@triton_launches
@pytest.mark.parametrize("kept", [True, False])
def test_descriptors_go_with_the_memory(kernels, monkeypatch, kept: bool):
    """Kept scratch has its descriptors made once; those of a call's own scratch would hold it beyond the call."""
    from comfyui_paro.kernels.attention import launch
    from comfyui_paro.kernels.core import scratch
    from comfyui_paro.kernels.pooling import triton_pools

    gluon, _ = kernels
    scratch.release_scratch()
    monkeypatch.setattr(scratch, "LARGEST_KEPT", (1 << 30) * kept)
    memories = []

    def noted(layout, device):
        tensors = scratch.allocate(layout, device)
        memories.append(weakref.ref(tensors["k"]._base))
        return tensors

    monkeypatch.setattr(launch, "allocate", noted)
    q, k, v, pattern, _ = make(SPARSE)
    for _ in range(2):
        launch.launch_attention(q, k, v, pattern, PRECISIONS["fp8"])
    first, second = (dict(zip(gluon.names, arguments, strict=False))["K"] for _, arguments, _ in gluon.calls)
    assert (first is second) is kept
    for recorder in (gluon, triton_pools._mean_queries, *(getattr(launch, name) for name in BEFORE)):
        recorder.calls.clear()
    del first, second
    assert [memory() is not None for memory in memories] == [kept, kept]
    scratch.release_scratch()
    assert not any(memory() for memory in memories)


@triton_launches
@pytest.mark.parametrize("other", ["bias", "tile", "pool"])
def test_other_calls_go_to_triton(kernels, other: str):
    from comfyui_paro.kernels.attention.tiles import Tile

    gluon, triton = kernels
    case = Case(
        "", dim=128, block_q=128, grid=(2, 10, 11), tail=True, bias=other == "bias", pool=32 if other == "pool" else 64
    )
    attend(case, tile=Tile(64, True, 4, 2) if other == "tile" else None)
    assert len(triton.calls) == 1 and not gluon.calls


@triton_launches
def test_queries_whose_channels_are_apart_go_to_triton(kernels):
    from comfyui_paro.kernels.attention.launch import launch_attention

    gluon, triton = kernels
    q, k, v, pattern, _ = make(SPARSE)
    q = torch.stack([q, q], 4)[..., 0]
    launch_attention(q, k, v, pattern, PRECISIONS["fp8"])
    assert len(triton.calls) == 1 and not gluon.calls


@triton_launches
def test_a_failing_kernel_is_replaced_for_good(kernels, caplog):
    gluon, triton = kernels
    gluon.error = RuntimeError("PassManager::run failed\nand much more")
    with caplog.at_level(logging.WARNING):
        attend(SPARSE)
        attend(SPARSE)
    assert len(gluon.calls) == 1 and len(triton.calls) == 2
    (record,) = caplog.records
    assert "RuntimeError: PassManager::run failed" in record.getMessage() and "much more" not in record.getMessage()
    # The replacement is launched as Triton's own plan says, not with what Gluon was given.
    assert triton.calls[0][2]["PADDED_D"] == 128 and triton.calls[0][2] == triton.calls[1][2]
    assert triton.calls[0][0] == triton.calls[1][0] == (4 * 3 * 2,)


@triton_launches
def test_missing_memory_is_no_failure_of_the_kernel(kernels):
    gluon, triton = kernels
    gluon.error = torch.OutOfMemoryError("no memory")
    from comfyui_paro.kernels.core.scratch import ScratchOutOfMemory

    with pytest.raises(ScratchOutOfMemory):
        attend(SPARSE)
    assert gluon_launch.why_unwanted(128, PRECISIONS["fp8"], "tail") is None and not triton.calls


@triton_launches
@pytest.mark.parametrize("chosen", [True, False])
def test_a_call_follows_the_table(kernels, monkeypatch, chosen: bool):
    gluon, triton = kernels
    monkeypatch.setattr(gluon_launch, "_all", False)
    for key, choice in gluon_launch.CHOICES.items():
        monkeypatch.setitem(
            gluon_launch.CHOICES,
            key,
            choice._replace(gluon=chosen if key == (128, gluon_launch.FP8, "tail") else not chosen),
        )
    attend(SPARSE)
    assert (len(gluon.calls), len(triton.calls)) == (int(chosen), int(not chosen))


@triton_launches
def test_forbidden_by_hand_and_allowed_again(kernels):
    gluon, triton = kernels
    gluon_launch.forbid("a comparison")
    attend(SPARSE)
    gluon_launch.forbid(None)
    attend(SPARSE)
    assert len(triton.calls) == len(gluon.calls) == 1
