"""What follows from a call's shapes and settings alone, worked out once: tile, scratch memory, grids, options.

A diffusion model makes the same call in every layer of every step, and at a few thousand tokens Python takes longer
than the GPU. So a call costs a look-up here, the launches, and nothing else. Importing this module needs no Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..core import scratch
from ..core.layout import Geometry, padded_dim
from ..core.precision import Precision
from ..core.quantization import hadamard_matrix
from ..core.scratch import ScratchLayout
from ..core.support import TRITON, Request, Target, form_of, nvidia
from ..pooling.reference import stretches_of
from .block_list_layout import context_blocks, list_shape
from .gluon_sm90 import launch as gluon_launch
from .tiles import Tile, in_channel_halves, needs_separate_tail, tail_stages, tile_for

STATISTICS_CHUNK = 512
# Up to this many chunks every program of the pre-pass adds them up itself; beyond, a kernel of its own does it once.
FEW_CHUNKS = 16
# The mean key is taken over every fourth block of 64 rows from this length on.
KEY_SAMPLE = 4
KEY_SAMPLE_FROM = 16384
LARGEST_TILE = 128
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
# Of attention, the fastest first: what `dispatch.served` chooses from.
KERNELS = (gluon_launch.KERNEL, TRITON)


@dataclass(frozen=True)
class CallKey:
    """All that decides how a call is done.

    batch, kv_heads, group  batch entries, key heads (of this part of the call, see `parts_of`), query heads of each.
    dim, dtype              head dimension and type of the inputs.
    capability              of the GPU, None on AMD; see `support.capability_of`.
    pool, tail, expansions  of the pooled tail: tokens per pooled key, whether there is one, mean queries per head at
                            most around which its pools are expanded (`pooling.reference`).
    biased                  whether there is a bias for each key.
    listed, lists           whether there is a mask, and whether its lists of blocks are written for this call.
    tile                    used in place of the table's for the Triton kernel; None: the table's.
    gluon                   whether the Gluon kernel is to do the call where it can.
    """

    batch: int
    kv_heads: int
    group: int
    dim: int
    dtype: torch.dtype
    capability: tuple[int, int] | None
    geometry: Geometry
    precision: Precision
    pool: int
    tail: bool
    biased: bool
    listed: bool
    lists: bool = False
    tile: Tile | None = None
    gluon: bool = False
    expansions: int = 0

    @property
    def request(self) -> Request:
        """What kernels are asked for."""
        target = Target("amd") if self.capability is None else nvidia(self.capability)
        form = form_of(self.listed, self.tail)
        return Request(
            target, self.dtype, self.dim, self.precision, form, self.geometry.block_q, self.pool, self.biased
        )


@dataclass(frozen=True, eq=False)
class Call:
    """Sizes, memory and launch options of one call. See `attention` for what is launched with them.

    values_scaled, smooth, rotate: what the pre-pass does to V and K. few_chunks: no kernel finishes the statistics.
    stretches: sets of pools that a query head has. rotation_scale makes the rotation by +-1 orthonormal. gluon: which
    kernel `attention_options` are for.
    """

    key: CallKey
    gluon: bool
    tile: Tile
    scratch: ScratchLayout
    smooth: bool
    values_scaled: bool
    rotate: bool
    few_chunks: bool
    blocks: int
    pools: int
    stretches: int
    chunks: int
    sampled_rows: int
    q_blocks: int
    q_blocks_grid: int
    rotation_scale: float
    statistics_grid: tuple[int, int, int]
    finish_grid: tuple[int]
    prepare_grid: tuple[int, int, int]
    pools_grid: tuple[int, int, int]
    attention_grid: tuple[int]
    statistics_options: dict
    finish_options: dict
    prepare_options: dict
    pools_options: dict
    attention_options: dict


@lru_cache(maxsize=16)
def rotation_matrix(head_dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Hadamard matrix of +-1, exact in 16 bits, zero-padded: `[padded_dim, padded_dim]`."""
    matrix = hadamard_matrix(head_dim, device) * (head_dim & -head_dim) ** 0.5
    padding = padded_dim(head_dim) - head_dim
    return torch.nn.functional.pad(matrix.round(), (0, padding, 0, padding)).to(dtype).contiguous()


def storage_types(key: CallKey) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of K (and staged Q), V and pooled V. bf16 keeps bf16's range; float32 becomes scaled fp16, which is finer."""
    wide = torch.bfloat16 if key.dtype == torch.bfloat16 else torch.float16
    keys, values = key.precision.keys.storage, key.precision.values.storage
    return keys or wide, values or wide, torch.float16 if values else wide


def packs(precision: Precision, padded: int) -> bool:
    """Whether K is stored two 4-bit values a byte: half a key must fill a tensor product's 32 bytes; D = 256 spills."""
    return precision.keys.bits == 4 and padded in (64, 128)


def _scratch_layout(
    key: CallKey, padded: int, blocks: int, pool_rows: int, stretches: int, chunks: int
) -> ScratchLayout:
    """Everything the kernels hand on to each other; absent parts have one element. Q is staged in the output."""
    g = key.geometry
    k_type, v_type, pooled_v_type = storage_types(key)
    heads = key.batch * key.kv_heads
    q_rows = heads * key.group * sum(
        -(-tokens // LARGEST_TILE) * LARGEST_TILE for tokens in (g.grid_tokens, g.context_tokens)
    )  # fmt: skip
    sets = (heads * key.group, stretches)
    pools = (*sets, pool_rows)
    key_row = padded // 2 if packs(key.precision, padded) else padded
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "blocks": (list_shape(g, key.kv_heads * key.group) if key.lists else (1,), torch.int16),
        "k": ((heads, blocks, 64, key_row), k_type),
        "v": ((heads, blocks, 64, padded), v_type),
        "k_scales": ((heads, blocks), torch.float32),
        "sums": ((heads, chunks, padded), torch.float32),
        "largest": ((heads, chunks, padded), torch.float32),
        "k_means": ((heads, padded), torch.float32),
        "v_scales": ((heads, padded), torch.float32),
        "key_bias": ((heads, blocks * 64) if key.biased else (1,), torch.float32),
        "mean_queries": ((*sets, padded) if key.tail and key.expansions else (1,), key.dtype),
        "pooled_k": ((*pools, key_row) if key.tail else (1,), k_type),
        "pooled_v": ((*pools, padded) if key.tail else (1,), pooled_v_type),
        "pooled_scales": (pools if key.tail else (1,), torch.float32),
        "pool_bias": (pools if key.tail else (1,), torch.float32),
        "q_scales": ((q_rows,), torch.float32),
        "q_excess": ((q_rows,) if packs(key.precision, padded) else (1,), torch.int32),
    }
    return ScratchLayout(shapes)


def _sampled_rows(length: int, every: int) -> int:
    """Rows in every `every`-th block of 64, the last of which may be short."""
    last = (length - 1) // (64 * every)
    return last * 64 + min(64, length - last * 64 * every)


@dataclass(frozen=True)
class _Preparation:
    """What the pre-pass does to K and V: see `Call`. packed: K is stored two values a byte. every: the mean key is
    taken over every so many blocks of 64 rows."""

    smooth: bool
    rotate: bool
    values_scaled: bool
    few_chunks: bool
    packed: bool
    every: int


def _preparation(key: CallKey, padded: int, chunks: int) -> _Preparation:
    precision = key.precision
    return _Preparation(
        smooth=precision.keys.rounds,
        rotate=precision.rotates,
        values_scaled=precision.values.rounds or key.dtype == torch.float32,
        # Rotating the mean takes a whole matrix: not for every program.
        few_chunks=chunks <= FEW_CHUNKS and not precision.rotates,
        packed=packs(precision, padded),
        # Any constant vector may be taken from all keys, so a long sequence's mean need not see every key.
        every=KEY_SAMPLE if key.geometry.length >= KEY_SAMPLE_FROM else 1,
    )


def _prepass_options(key: CallKey, padded: int, preparation: _Preparation) -> dict[str, dict]:
    """Of the kernels before attention, as `Call` names them."""
    precision, p = key.precision, preparation
    shared = {"PADDED_D": padded, "SMOOTH": p.smooth, "ROTATE": p.rotate, "VALUES_SCALED": p.values_scaled, **LAUNCH}
    finish = {**shared, "PV": precision.multiplied_values, "V_LEVELS": precision.values.largest}
    stored = {"D": key.dim, "QK": precision.qk, "BIASED": key.biased, "PACKED": p.packed}
    statistics = {
        "D": key.dim, "PADDED_D": padded, "CHUNK": STATISTICS_CHUNK, "SUM_EVERY": p.every if p.smooth else 0,
        "NEED_MAX": p.values_scaled, **LAUNCH,
    }  # fmt: skip
    return {
        "statistics_options": statistics,
        "finish_options": finish,
        "prepare_options": {**finish, **stored, "FINISH": p.few_chunks},
        "pools_options": {**shared, **stored, "POOL": key.pool},
    }


def _block_q(key: CallKey, tile: Tile) -> int:
    """Query rows of a block: of the mask, or of a tile without one."""
    return key.geometry.block_q if key.listed else tile.rows


def _attention_options(key: CallKey, padded: int, preparation: _Preparation, tile: Tile) -> dict:
    """Of the Triton attention kernel."""
    precision, capability = key.precision, key.capability
    return {
        "D": key.dim, "PADDED_D": padded, "ROWS": tile.rows, "BLOCK_Q": _block_q(key, tile), "PAIRS": tile.pairs,
        "QK": precision.qk, "PV": precision.multiplied_values, "P_LOG2": precision.weights_log2,
        "LISTED": key.listed, "TAIL": key.tail, "POOL": key.pool, "BIASED": key.biased, "ROTATE": preparation.rotate,
        "VALUES_SCALED": preparation.values_scaled, "PACKED": preparation.packed,
        "SEPARATE_TAIL": needs_separate_tail(capability, tile, padded, precision),
        "HALVES": in_channel_halves(capability, tile, padded, precision), "STAGES": tile.stages,
        "TAIL_STAGES": tail_stages(capability, tile),
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
    }  # fmt: skip


@lru_cache(maxsize=256)
def call_of(key: CallKey) -> Call:
    """The plan of a call."""
    g, precision, padded = key.geometry, key.precision, padded_dim(key.dim)
    chunks = -(-g.length // STATISTICS_CHUNK)
    preparation = _preparation(key, padded, chunks)
    gluon = key.gluon and key.tile is None and gluon_launch.KERNEL.why_not(key.request) is None
    if gluon:
        tile = gluon_launch.TILE
        attention = gluon_launch.options(key.dim, precision, key.listed, key.tail)
    else:
        tile = key.tile or tile_for(key.capability, padded, precision, g.block_q, key.listed)
        attention = _attention_options(key, padded, preparation, tile)
    block_q = _block_q(key, tile)
    blocks = g.k_blocks + context_blocks(g.context_tokens, g.block_k)
    pools, stretches = -(-g.grid_tokens // key.pool), stretches_of(g, key.expansions)
    # Pools are read 64 at a time.
    pool_rows = -(-pools // 64) * 64
    q_blocks_grid = -(-g.grid_tokens // block_q)
    q_blocks = q_blocks_grid + context_blocks(g.context_tokens, block_q)
    return Call(
        key=key,
        gluon=gluon,
        tile=tile,
        scratch=_scratch_layout(key, padded, blocks, pool_rows, stretches, chunks),
        smooth=preparation.smooth,
        values_scaled=preparation.values_scaled,
        rotate=preparation.rotate,
        few_chunks=preparation.few_chunks,
        blocks=blocks,
        pools=pools,
        stretches=stretches,
        chunks=chunks,
        sampled_rows=_sampled_rows(g.length, preparation.every),
        q_blocks=q_blocks,
        q_blocks_grid=q_blocks_grid,
        rotation_scale=(key.dim & -key.dim) ** -0.5 if preparation.rotate else 1.0,
        statistics_grid=(chunks, key.kv_heads, key.batch),
        finish_grid=(key.batch * key.kv_heads,),
        prepare_grid=(blocks, key.kv_heads, key.batch),
        pools_grid=(g.k_blocks, key.kv_heads * key.group, key.batch),
        attention_grid=(key.batch * key.kv_heads * key.group * q_blocks * (block_q // tile.rows),),
        attention_options=attention,
        **_prepass_options(key, padded, preparation),
    )


@dataclass(frozen=True, eq=False)
class Part:
    """Heads that are done together. kv and rows: which key and query heads; None: all of them."""

    call: Call
    kv: slice | None
    rows: slice | None


@lru_cache(maxsize=256)
def parts_of(key: CallKey, most: int) -> tuple[Part, ...]:
    """The call in groups of at most `most` key heads, each within the scratch budget unless it is a single head.

    Groups of four and more are multiples of four, so that slices of int32 tensors stay aligned to 16 bytes: Triton
    compiles a kernel anew for pointers that are not.
    """
    per_head = call_of(_with_heads(key, 1)).scratch.bytes
    heads = max(1, min(most, scratch.BUDGET // per_head))
    if heads >= key.kv_heads:
        return (Part(call_of(key), None, None),)
    heads = heads // 4 * 4 or heads
    return tuple(_groups(key, heads))


def _with_heads(key: CallKey, heads: int) -> CallKey:
    return replace(key, kv_heads=heads)


def _groups(key: CallKey, heads: int) -> Iterator[Part]:
    for first in range(0, key.kv_heads, heads):
        here = min(heads, key.kv_heads - first)
        rows = slice(first * key.group, (first + here) * key.group)
        yield Part(call_of(_with_heads(key, here)), slice(first, first + here), rows)
