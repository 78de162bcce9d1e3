"""Around the kernels: calls refused before any launch, backends, memory, torch.compile, lists, honest capabilities."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_paro.kernels.attention.api import sparse_attention
from comfyui_paro.kernels.attention.reference import sparse_attention_reference
from comfyui_paro.kernels.attention.tiles import TILES, tile_for
from comfyui_paro.kernels.core import scratch
from comfyui_paro.kernels.core.dispatch import _on_gpu, chosen_backend, resolve, resolve_precision
from comfyui_paro.kernels.core.pattern import SparsePattern
from comfyui_paro.kernels.core.precision import PRECISIONS, Precision
from comfyui_paro.kernels.core.scratch import ScratchOutOfMemory
from comfyui_paro.kernels.core.support import interpreted

from .cases import Case, make, oracle, relative_error

INT8 = PRECISIONS["int8"]
SMALL = Case("", grid=(1, 7, 11), suffix=2)
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


def with_pattern(pattern: SparsePattern, **changes) -> SparsePattern:
    return replace(pattern, **changes)


def refusals():
    """Name -> (changed call, what the one line must name)."""
    q, k, v, p, _ = make(SMALL)
    return {
        "three dimensions": ((q[0], k, v, p, {}), "B, H, L, D"),
        "length": ((q[:, :, :-1], k, v, p, {}), "length"),
        "key and value shapes": ((q, k, v[:, :, :-1], p, {}), "fit together"),
        "mixed dtypes": ((q, k.float(), v, p, {}), "dtype"),
        "integers": ((q.int(), k.int(), v.int(), p, {}), "dtype"),
        "shape of the words": ((q, k, v, with_pattern(p, kept_words=p.kept_words[:, :, :-1]), {}), "kept_words"),
        "dtype of the words": ((q, k, v, with_pattern(p, kept_words=p.kept_words.int()), {}), "kept_words"),
        "device of the words": ((q, k, v, with_pattern(p, kept_words=p.kept_words.to("meta")), {}), "kept_words"),
        "input device": ((q, k.to("meta"), v, p, {}), "device"),
        "table length": ((q, k, v, with_pattern(p, tables=p.tables[:, :-1]), {}), "tables"),
        "heads of the pattern": ((q, k, v, with_pattern(p, order_of_head=p.order_of_head[:1]), {}), "order_of_head"),
        "tail bias": ((q, k, v, with_pattern(p, tail_bias=torch.zeros(5)), {}), "tail_bias"),
        "pool": ((q, k, v, with_pattern(p, pool=48), {}), "pool"),
        "block size": ((q, k, v, with_pattern(p, geometry=replace(p.geometry, block_q=32)), {}), "block sizes"),
        "key bias": ((q, k, v, p, {"key_bias": torch.zeros(1, 3)}), "key_bias"),
        "scale": ((q, k, v, p, {"scale": -1.0}), "scale"),
        "out": ((q, k, v, p, {"out": q[:, :1]}), "out"),
        "dtype of out": ((q, k, v, p, {"out": q.float()}), "out"),
        "flag": ((q, k, v, p, {"nonfinite": torch.zeros(1)}), "nonfinite"),
        "backend": ((q, k, v, p, {"backend": "cuda"}), "backend"),
    }


@pytest.mark.parametrize("name", refusals())
def test_refused_with_one_line_before_any_launch(name: str, monkeypatch):
    (q, k, v, pattern, options), word = refusals()[name]
    if interpreted():
        from comfyui_paro.kernels.attention import launch

        monkeypatch.setattr(launch, "launch_attention", lambda *a, **b: pytest.fail("launched"))
        options = {"backend": "triton", **options}
    with pytest.raises(ValueError, match=word) as caught:
        sparse_attention(q, k, v, pattern, INT8, **options)
    assert "\n" not in str(caught.value)


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import _checkout; _checkout.register(); "
        "import comfyui_paro.kernels.attention.api, comfyui_paro.kernels.attention.tiles; "
        "assert 'triton' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_reasons_why_triton_does_not_serve(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def reason(device, dtype, head_dim, precision="int8"):
        return resolve("triton", device, dtype, head_dim, PRECISIONS[precision]).reason

    assert "head dimension" in reason(cpu, torch.float16, 512)
    assert "float64" in reason(cpu, torch.float64, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "does not run on cpu" in reason(cpu, torch.float16, 64)
    with pytest.raises(ValueError, match="does not run on cpu"):
        chosen_backend("triton", cpu, torch.float16, 64, INT8)
    for capability in ((7, 5), (8, 6)):
        _on_gpu.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, of=capability: of)
        assert (reason(gpu, torch.float16, 64) is None) is (capability == (8, 6))
    assert "fp8" in reason(gpu, torch.float16, 64, "fp8")
    assert "rotation" in reason(gpu, torch.float16, 256, "int4")
    assert reason(gpu, torch.float16, 128, "int4") is None
    # Left to the reference by an operator; the runtime, which has the host's attention, goes by the reason.
    found = resolve("auto", gpu, torch.float16, 64, PRECISIONS["fp8"])
    assert found.by == chosen_backend("auto", gpu, torch.float16, 64, PRECISIONS["fp8"]) == "reference" and found.reason
    _on_gpu.cache_clear()


def test_auto_is_the_reference_on_a_cpu():
    q, k, v, pattern, _ = make(SMALL)
    expected = sparse_attention_reference(q, k, v, pattern, INT8)
    assert torch.equal(sparse_attention(q, k, v, pattern, INT8), expected)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)])
def test_auto_is_a_precision_that_the_gpu_multiplies_fast(monkeypatch, capability):
    """Never one with 4-bit keys, which are no faster anywhere; FP8 on data-centre GPUs only."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    chosen = resolve_precision("auto", "auto", torch.device("cuda"))
    assert chosen == ("fp8" if capability[0] in (9, 10) else "int8_pv8")
    assert resolve_precision("auto", "int8", torch.device("cuda")) == "int8"
    assert resolve_precision("16bit", "int8", torch.device("cuda")) == "16bit"
    assert resolve_precision("auto", "auto", torch.device("cpu")) == "int8"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1), None])
@pytest.mark.parametrize("block_q, listed", [(64, True), (128, True), (64, False)])
def test_every_call_has_a_tile_that_divides_its_blocks(capability, block_q: int, listed: bool):
    for padded in (32, 64, 128, 256):
        for precision in PRECISIONS.values():
            tile = tile_for(capability, padded, precision, block_q, listed)
            assert not listed or block_q % tile.rows == 0


@pytest.mark.parametrize("precision", PRECISIONS.values())
def test_a_later_gpu_of_an_architecture_has_its_tiles(precision):
    """12.1 is compiled and switched like 12.0 everywhere else, too: with the tiles of `mma` its tails would spill."""
    for padded, block_q, listed in ((64, 128, True), (128, 128, True), (128, 64, True), (128, 64, False)):
        call = (padded, precision, block_q, listed)
        assert tile_for((12, 1), *call) == tile_for((12, 0), *call)


def test_every_tile_says_why():
    assert all(entry.reason for entry in TILES.values())


@needs_interpreter
class TestScratch:
    def test_one_buffer_serves_every_layer(self):
        q, k, v, pattern, _ = make(SMALL)
        scratch.release_scratch()
        sparse_attention(q, k, v, pattern, INT8, backend="triton")
        held = scratch.scratch_bytes()
        sparse_attention(q, k, v, pattern, INT8, backend="triton")
        assert scratch.scratch_bytes() == held > 0
        scratch.release_scratch()
        assert scratch.scratch_bytes() == 0

    def test_threads_share_a_stream_and_no_buffer(self, monkeypatch):
        """One may launch its attention between the preparation and the attention of the other."""
        empty, stream = torch.empty, SimpleNamespace(cuda_stream=0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch, "empty", lambda *shape, device, **more: empty(*shape, **more))
        layout, found, both = scratch.ScratchLayout({"k": ((64,), torch.float32)}), [], threading.Barrier(2, timeout=60)

        def call():
            both.wait()  # a thread that is over may leave another one its number
            first, again = (scratch.allocate(layout, torch.device("cuda"))["k"] for _ in range(2))
            found.append((first, again))
            both.wait()

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(first is again for first, again in found)
        assert found[0][0].data_ptr() != found[1][0].data_ptr()

    @pytest.mark.ordinary_tensors  # others do not tell whose memory they are a view of
    @pytest.mark.parametrize("larger", [True, False])
    def test_large_scratch_is_not_kept(self, monkeypatch, larger: bool):
        """Neither the memory nor a view of it outlives its call, and the results are the same."""
        from comfyui_paro.kernels.attention.launch import pieces_of, prepare

        q, k, v, pattern, _ = make(replace(SMALL, tail=True))
        expected = sparse_attention(q, k, v, pattern, INT8, backend="triton")
        (piece,) = pieces_of(q, k, v, torch.empty_like(q), pattern, INT8)
        monkeypatch.setattr(scratch, "LARGEST_KEPT", piece.call.scratch.bytes - larger)
        scratch.release_scratch()
        assert torch.equal(sparse_attention(q, k, v, pattern, INT8, backend="triton"), expected)
        assert scratch.scratch_bytes() == (0 if larger else piece.call.scratch.bytes)
        first, second = (prepare(piece, pattern, 0.1) for _ in range(2))
        assert (first["k"].data_ptr() != second["k"].data_ptr()) is larger
        memory = weakref.ref(first["k"]._base)
        del first, second
        assert (memory() is None) is larger

    def test_missing_memory_for_large_scratch_is_told(self, monkeypatch):
        """As with kept scratch: smaller groups of heads, then a typed error; nothing stays behind."""
        q, k, v, pattern, _ = make(replace(SMALL, heads=4, kv_heads=4, tail=True))
        whole = sparse_attention(q, k, v, pattern, INT8, backend="triton")
        held, empty, asked = scratch.scratch_bytes(), torch.empty, []

        def limited(*shape, dtype=None, **rest):
            if dtype == torch.uint8 and rest.get("device") is not None:
                asked.append(shape[0])
                if shape[0] > limit:
                    raise torch.OutOfMemoryError("no room")
            return empty(*shape, dtype=dtype, **rest)

        monkeypatch.setattr(scratch, "LARGEST_KEPT", 0)
        monkeypatch.setattr(torch, "empty", limited)
        for limit in (held // 3, 0):
            scratch.release_scratch()
            asked.clear()
            if limit:
                assert torch.equal(sparse_attention(q, k, v, pattern, INT8, backend="triton"), whole)
                assert sum(size <= limit for size in asked) == 4
            else:
                with pytest.raises(ScratchOutOfMemory):
                    sparse_attention(q, k, v, pattern, INT8, backend="triton")
            assert scratch.scratch_bytes() == 0

    def test_short_of_memory_the_heads_are_done_in_groups(self, monkeypatch):
        from comfyui_paro.kernels.attention import launch

        q, k, v, pattern, _ = make(replace(SMALL, heads=4, kv_heads=4, tail=True))
        whole = sparse_attention(q, k, v, pattern, INT8, backend="triton")
        fits = []

        def limited(layout, device):
            if layout.bytes > limit:
                raise torch.OutOfMemoryError("no room")
            fits.append(layout.bytes)
            return scratch.allocate(layout, device)

        limit = scratch.scratch_bytes() // 3
        scratch.release_scratch()
        monkeypatch.setattr(launch, "allocate", limited)
        grouped = sparse_attention(q, k, v, pattern, INT8, backend="triton")
        assert len(fits) > 1
        assert torch.equal(grouped, whole)

    def test_out_of_memory_for_one_head_is_a_typed_error(self, monkeypatch):
        from comfyui_paro.kernels.attention import launch

        def refuse(layout, device):
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(launch, "allocate", refuse)
        q, k, v, pattern, _ = make(SMALL)
        with pytest.raises(ScratchOutOfMemory):
            sparse_attention(q, k, v, pattern, INT8, backend="triton")


def test_compiled_without_graph_breaks_or_recompilation():
    q, k, v, pattern, _ = make(replace(SMALL, tail=True, dtype=torch.float32))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def step(q, k, v, pattern):
        return sparse_attention(q, k, v, pattern, Precision("16", "16"), backend="reference") * 2

    expected = oracle(q, k, v, pattern) * 2
    for _ in range(3):
        assert relative_error(step(q, k, v, pattern), expected) < 1e-5
    step(q + 1, k, v, pattern)
    assert len(graphs) == 1


def test_the_operator_is_sound():
    from comfyui_paro.kernels.attention.api import attention_operator

    q, k, v, p, _ = make(replace(SMALL, dtype=torch.float32))
    g = p.geometry
    arguments = (
        q,
        k,
        v,
        p.tables,
        p.order_of_head,
        p.kept_words,
        None,
        None,
        g.prefix,
        list(g.grid),
        g.suffix,
        g.block_q,
    )
    torch.library.opcheck(
        attention_operator,
        (*arguments, 64, 16, "int8", "16", False, None, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_shipped_tiles_compile_for_every_architecture():
    """The tiles for D = 128 with a list and the tail; `python scripts/check_kernels.py` compiles all of them."""
    pytest.importorskip("triton")
    script = Path(__file__).resolve().parents[3] / "scripts" / "check_kernels.py"
    done = subprocess.run([sys.executable, script, "--quick", "--jobs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
