"""Kept blocks: from bits to words, the lists made of them, and what they hold of the device's memory between calls."""

from __future__ import annotations

import weakref

import pytest
import torch
from comfyui_paro.kernels.attention import block_list_layout as lists_module
from comfyui_paro.kernels.attention import launch_plan
from comfyui_paro.kernels.attention.api import sparse_attention
from comfyui_paro.kernels.attention.block_list_layout import LIST_PADDING, held_bytes
from comfyui_paro.kernels.attention.block_lists import block_list
from comfyui_paro.kernels.core import scratch
from comfyui_paro.kernels.core.block_mask import count_bits, pack_bits, row_words, unpack_bits, words_of_bits
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.pattern import SparsePattern
from comfyui_paro.kernels.core.precision import PRECISIONS
from comfyui_paro.kernels.core.support import interpreted

from .cases import Case, make, with_mask

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 before Triton is imported")
GEOMETRIES = {
    "ragged grid and context": Geometry(70, (3, 7, 11), 7),
    "whole blocks, no context": Geometry(0, (1, 8, 24), 0),
    "one block in all": Geometry(0, (1, 4, 5), 0),
    "a context of whole blocks": Geometry(64, (2, 7, 9), 64),
    "query blocks of 128, ragged": Geometry(2, (3, 9, 13), 5, 128),
    "two words a row, the last one full": Geometry(0, (2, 64, 64), 3),
    "three words a row": Geometry(130, (7, 41, 43), 0, 128),
}
WAN_720P = Geometry(0, (21, 45, 80), 0, 128)


@pytest.fixture
def each_call(monkeypatch):
    """No list is small enough to be kept."""
    monkeypatch.setattr(lists_module, "LARGEST_KEPT_LIST", 0)
    launch_plan.call_of.cache_clear()
    launch_plan.parts_of.cache_clear()
    yield
    launch_plan.call_of.cache_clear()
    launch_plan.parts_of.cache_clear()


def random_mask(g: Geometry, heads: int = 3, density: float = 0.4) -> torch.Tensor:
    """Rows that keep nothing and rows that keep everything among them."""
    mask = torch.rand(heads, g.q_blocks, g.k_blocks) < density
    mask[0, 0] = mask[-1, g.q_blocks // 2] = mask[1, -1] = False
    mask[-1, -1] = True
    return mask


def kept_by(mask: torch.Tensor, g: Geometry, head: int, row: int) -> list[int]:
    return mask[head, row].nonzero().flatten().tolist() or [row * g.block_q // g.block_k]


def pattern_of(g: Geometry, mask: torch.Tensor) -> SparsePattern:
    heads = mask.shape[0]
    return SparsePattern.from_mask(g, torch.arange(g.grid_tokens).int()[None], torch.zeros(heads).int(), mask)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_words(name: str):
    g, mask = GEOMETRIES[name], random_mask(GEOMETRIES[name])
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)
    words = words_of_bits(pack_bits(mask), 3, g)
    assert words.shape == (3, g.q_blocks, row_words(g.k_blocks)) and words.dtype == torch.int64
    for head in range(3):
        for row in range(g.q_blocks):
            kept = kept_by(mask, g, head, row)
            bits = sum((int(word) % (1 << 64)) << (64 * i) for i, word in enumerate(words[head, row]))
            assert bits == sum(1 << block for block in kept)
    pattern = pattern_of(g, mask)
    assert torch.equal(pattern.kept_words, words)
    assert pattern.mask.shape == mask.shape and pattern.mask.dtype == torch.bool
    assert not (mask & ~pattern.mask).any() and pattern.mask.any(2).all()
    assert torch.equal(pattern.mask[mask.any(2)], mask[mask.any(2)])
    assert pattern.density == pytest.approx(pattern.mask.double().mean().item())


def test_bits_are_counted():
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (1000,))
    words[:3] = torch.tensor([0, -1, -(1 << 63)])
    assert count_bits(words).tolist() == [(word % (1 << 64)).bit_count() for word in words.tolist()]


@pytest.mark.parametrize("change", [lambda m: m.int(), lambda m: m[0], lambda m: m[:, 1:], lambda m: m[:, :, 1:]])
def test_another_mask_is_refused_with_one_line(change):
    g = GEOMETRIES["ragged grid and context"]
    with pytest.raises(ValueError, match=r"^mask: expected bool \[q_heads, 4, 4\], got [^\n]*$"):
        pattern_of(g, change(random_mask(g)))


@needs_interpreter
@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_lists(name: str, columns: int, monkeypatch):
    """Every row against plain Python: its full blocks rising, context behind the grid, then the ragged ones."""
    from comfyui_paro.kernels.attention import triton_block_lists

    monkeypatch.setattr(triton_block_lists, "COLUMNS", columns)
    monkeypatch.setattr(torch, "empty", lambda *shape, **rest: torch.full(*shape, -7, **rest))
    g, mask = GEOMETRIES[name], random_mask(GEOMETRIES[name])
    lists = block_list(pattern_of(g, mask))
    context = range(g.k_blocks, g.k_blocks - (-g.context_tokens // 64))
    ragged = [g.k_blocks - 1] * (g.grid_tokens % 64 > 0) + [context[-1] if context else 0] * (g.context_tokens % 64 > 0)
    flat = lists.blocks.flatten()
    for head in range(3):
        for row in range(g.q_blocks + 1):
            kept = kept_by(mask, g, head, row) if row < g.q_blocks else range(g.k_blocks)
            full = [block for block in (*kept, *context) if block not in ragged]
            expected = full + [block for block in ragged if block in kept or block in context]
            start, count = int(lists.start[head, row]), int(lists.count[head, row])
            assert flat[start : start + count].tolist() == expected
            assert int(lists.full[head, row]) == len(full)
            assert flat[start + count : start + count + LIST_PADDING].tolist() == [0] * LIST_PADDING
            assert (start * 2) % 16 == 0
    lengths = [[len(kept_by(mask, g, head, row)) for row in range(g.q_blocks)] for head in range(3)]
    assert lists.head_order.tolist() == sorted(range(3), key=lambda head: -sum(lengths[head]))
    context_rows = -(-g.context_tokens // g.block_q)
    for head in range(3):
        of_row = [*lengths[head], *[g.k_blocks] * context_rows]
        assert lists.row_order[head].tolist() == sorted(range(len(of_row)), key=lambda row: -of_row[row])


@needs_interpreter
def test_lists_of_some_heads():
    g = GEOMETRIES["ragged grid and context"]
    lists = block_list(pattern_of(g, random_mask(g)))
    some = lists.of_heads(slice(1, 3))
    assert lists.of_heads(slice(1, 3)) is some
    for name in ("row_order", "full", "count", "blocks"):
        assert torch.equal(getattr(some, name), getattr(lists, name)[1:])
    assert torch.equal(some.start, lists.start[1:] - lists.start[1, 0])
    assert torch.equal(some.head_order, lists.head_order[lists.head_order > 0] - 1)


@needs_interpreter
@pytest.mark.ordinary_tensors  # changed in place, which the others do not count
def test_lists_go_by_the_words_and_die_with_them():
    _, _, _, pattern, _ = make(Case("", grid=(3, 7, 11), suffix=70))
    lists = block_list(pattern)
    assert block_list(pattern) is lists
    assert (
        block_list(SparsePattern(pattern.geometry, pattern.tables, pattern.order_of_head, pattern.kept_words)) is lists
    )
    pattern.kept_words[0, 0, 0] = 1
    changed = block_list(pattern)
    assert changed is not lists and int(changed.count[0, 0]) == 3
    alive = weakref.ref(changed)
    del changed, lists, pattern
    assert alive() is None


CALLS = {
    "ragged, with context": Case("", grid=(3, 7, 11), prefix=70, suffix=7, tail=True, mask=0.4),
    "rows that keep nothing": Case("", mask="empty", suffix=2),
    "query blocks of 128": Case("", block_q=128, grid=(3, 10, 11), tail=True, prefix=9),
    "grouped queries, a batch": Case("", batch=2, heads=6, kv_heads=3, tail=True, dim=32),
}


@needs_interpreter
@pytest.mark.parametrize("budget", [1, 1 << 40])
@pytest.mark.parametrize("name", CALLS)
def test_lists_made_for_each_call_give_the_same_bits(name: str, budget: int, monkeypatch):
    """All heads together, and one by one."""
    q, k, v, pattern, bias = make(CALLS[name])
    monkeypatch.setattr(scratch, "BUDGET", budget)
    found = []
    for size in (1 << 40, 0):
        monkeypatch.setattr(lists_module, "LARGEST_KEPT_LIST", size)
        launch_plan.parts_of.cache_clear()
        fresh = with_mask(pattern, pattern.mask)
        found.append(sparse_attention(q, k, v, fresh, PRECISIONS["int8"], key_bias=bias, backend="triton"))
        assert (block_list(fresh).blocks is None) == (size == 0)
    launch_plan.parts_of.cache_clear()
    assert torch.equal(*found)


@needs_interpreter
def test_lists_of_a_call_lie_in_its_scratch(each_call):
    from comfyui_paro.kernels.attention.launch import pieces_of, prepare

    q, k, v, pattern, _ = make(Case("", grid=(3, 7, 11), heads=4, kv_heads=2, suffix=3))
    (piece,) = pieces_of(q, k, v, torch.empty_like(q), pattern, PRECISIONS["int8"])
    prepared = prepare(piece, pattern, 0.1)
    assert prepared["blocks"].shape == lists_module.list_shape(pattern.geometry, 4)
    assert piece.listed(prepared)[-1] is prepared["blocks"]
    (dense,) = pieces_of(q, k, v, torch.empty_like(q), SparsePattern(pattern.geometry, pattern.tables,
                         pattern.order_of_head), PRECISIONS["int8"])  # fmt: skip
    assert dense.call.scratch.places["blocks"][2] == (1,)


def bytes_of(words: torch.Tensor, lists) -> int:
    tensors = [words, *(x for x in vars(lists).values() if isinstance(x, torch.Tensor))]
    return sum(x.untyped_storage().nbytes() for x in tensors)


def test_what_a_site_of_a_14b_model_at_720p_holds():
    """On the meta device, where shapes are all there is."""
    g, heads = WAN_720P, 40
    bits = torch.empty(heads * g.q_blocks * g.k_blocks // 8 + 1, dtype=torch.uint8, device="meta")
    words = words_of_bits(bits, heads, g)
    lists = block_list(SparsePattern(g, torch.empty(1, g.grid_tokens, device="meta"), words[0, 0], words))
    assert lists.blocks is None and bytes_of(words, lists) == held_bytes(g, heads)
    assert held_bytes(g, heads) == 4_161_280


@needs_interpreter
def test_what_a_small_site_holds():
    pattern = make(Case("", grid=(3, 7, 11), prefix=70, suffix=7))[3]
    assert bytes_of(pattern.kept_words, block_list(pattern)) == held_bytes(pattern.geometry, 2)
    assert not lists_module.made_for_each_call(Geometry(512, (1, 64, 64), 0, 64), 24)  # Flux at 1024 x 1024


def test_forty_sites_of_720p_stay_on_a_gpu_of_12_gb():
    from comfyui_paro.paro_runtime.attention import patterns

    assert 40 * held_bytes(WAN_720P, 40) < patterns.CACHE_SHARE * 11.6 * 2**30
