"""Launches the pre-pass and the attention kernel for one call. Importing this module needs Triton."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from .block_list import BlockList, block_list, context_blocks
from .configs import Tile, in_channel_halves, needs_separate_tail, tile_for
from .problem import Precision, SparsePattern
from .quantization import hadamard_matrix
from .scratch import Scratch, ScratchOutOfMemory, release_scratch
from .support import LOWEST_CAPABILITY
from .triton_attention import attention_forward
from .triton_prepass import channel_statistics, prepare_keys_values, quantize_pools

log = logging.getLogger("paro")

STATISTICS_CHUNK = 512
LARGEST_TILE = 128
# The mean key is taken over every fourth block of 64 rows from this length on.
KEY_SAMPLE = 4
KEY_SAMPLE_FROM = 16384
# Largest value of 8-bit V; 2**P_LOG2 is the same for P at its row's maximum.
VALUE_LEVELS = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
P_LOG2 = {"16": 0.0, "fp8": math.log2(448), "int8": math.log2(127), "int4": math.log2(15)}


@dataclass(frozen=True)
class KeysValues:
    """What the pre-pass leaves for the kernel; shapes in `triton_prepass`. Absent parts are None."""

    k: torch.Tensor
    k_scales: torch.Tensor
    v: torch.Tensor
    v_scales: torch.Tensor | None
    key_bias: torch.Tensor | None
    pooled_k: torch.Tensor | None
    pooled_scales: torch.Tensor | None
    pooled_v: torch.Tensor | None
    rotation: torch.Tensor | None
    q_staged: torch.Tensor
    q_scales: torch.Tensor


def padded_dim(head_dim: int) -> int:
    """Head dimension the kernels work with: the next power of two, at least 32."""
    return max(32, triton.next_power_of_2(head_dim))


@lru_cache(maxsize=16)
def _rotation(head_dim: int, device, dtype) -> tuple[torch.Tensor, float]:
    """Hadamard matrix of +-1 (exact in 16 bits), zero-padded, and the factor that makes it orthonormal."""
    scale = (head_dim & -head_dim) ** -0.5
    matrix = hadamard_matrix(head_dim, device) / scale
    padding = padded_dim(head_dim) - head_dim
    return torch.nn.functional.pad(matrix.round(), (0, padding, 0, padding)).to(dtype).contiguous(), scale


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: SparsePattern,
    precision: Precision,
    key_bias: torch.Tensor | None = None,
) -> KeysValues:
    """Reorder, smooth, rotate, quantise and pool K and V `[B, Hkv, L, D]` into scratch memory.

    The kernel quantises Q itself; only the room for it is reserved here.
    """
    g = pattern.geometry
    batch, heads, length, dim = k.shape
    padded = padded_dim(dim)
    device = k.device
    blocks = g.k_blocks + context_blocks(g.context_tokens, g.block_k)
    tail = pattern.mask is not None and pattern.tail_bias is not None
    pools = -(-g.grid_tokens // pattern.pool)
    # 16-bit storage: bf16 keeps bf16's range; float32 becomes scaled fp16, which is finer.
    wide = torch.bfloat16 if k.dtype == torch.bfloat16 else torch.float16
    k_type = wide if precision.qk == "16" else torch.int8
    v_type = {"16": wide, "fp8": torch.float8_e4m3fn}.get(precision.pv, torch.int8)
    pooled_v_type = wide if precision.pv == "16" else torch.float16
    values_scaled = precision.pv != "16" or k.dtype == torch.float32
    smooth = precision.qk != "16"
    rotate = smooth and precision.hadamard
    chunks = triton.cdiv(length, STATISTICS_CHUNK)

    scratch = Scratch(device)
    scratch.ask((batch * heads, blocks, 64, padded), k_type)
    scratch.ask((batch * heads, blocks, 64, padded), v_type)
    scratch.ask((batch * heads, blocks), torch.float32)
    scratch.ask((2, batch * heads, chunks, padded), torch.float32)
    scratch.ask((batch * heads, blocks * 64) if key_bias is not None else (1,), torch.float32)
    pool_blocks = triton.cdiv(pools, 64)
    pooled_shape = (batch * heads, pool_blocks * 64, padded) if tail else (1,)
    scratch.ask(pooled_shape, torch.float32)
    scratch.ask(pooled_shape, k_type)
    scratch.ask(pooled_shape, pooled_v_type)
    scratch.ask((batch * heads, pool_blocks) if tail else (1,), torch.float32)
    q_rows = q.shape[0] * q.shape[1] * (_padded_rows(g.grid_tokens) + _padded_rows(g.context_tokens))
    scratch.ask((q_rows, padded), k_type)
    scratch.ask((q_rows,), torch.float32)
    (
        k_out, v_out, k_scales, partial, bias_out, pooled, pooled_k, pooled_v, pooled_scales, q_staged, q_scales,
    ) = scratch.allocate()  # fmt: skip

    rotation, rotation_scale = _rotation(dim, device, k.dtype) if rotate else (None, 1.0)
    k_means = v_scales = None
    # Any constant vector may be taken from all keys, so a long sequence's mean need not see every key.
    every = KEY_SAMPLE if length >= KEY_SAMPLE_FROM else 1
    if smooth or values_scaled:
        channel_statistics[(chunks, heads, batch)](
            k, v, partial[0], partial[1], *k.stride(), *v.stride(), length, heads,
            D=dim, PADDED_D=padded, CHUNK=STATISTICS_CHUNK, SUM_EVERY=every if smooth else 0, NEED_MAX=values_scaled,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if smooth:
        k_means = partial[0].sum(1) / _sampled_rows(length, every)
        if rotate:
            k_means = k_means @ rotation.float() * rotation_scale
    if values_scaled:
        largest = partial[1].amax(1).clamp_min(1e-12)
        sixteen_bit = precision.pv == "16"
        v_scales = torch.exp2(largest.log2().ceil()) if sixteen_bit else largest / VALUE_LEVELS[precision.pv]
    prepare_keys_values[(blocks, heads, batch)](
        k, v, key_bias, k_out, v_out, bias_out, k_scales, k_means, v_scales, pooled, pooled_v,
        pattern.tables, pattern.order_of_head, rotation,
        *k.stride(), *v.stride(), 0 if key_bias is None else key_bias.stride(0),
        heads, g.grid_tokens, g.prefix, length, blocks, g.k_blocks, pools, rotation_scale,
        D=dim, PADDED_D=padded, QK=precision.qk, PV=_kernel_pv(precision), V_LEVELS=VALUE_LEVELS.get(precision.pv, 0.0),
        SMOOTH=smooth, ROTATE=rotate, VALUES_SCALED=values_scaled, BIASED=key_bias is not None,
        TAIL=tail, POOL=pattern.pool, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if tail:
        quantize_pools[(pool_blocks, batch * heads)](
            pooled,
            pooled_k,
            pooled_v,
            pooled_scales,
            pools,
            PADDED_D=padded,
            QK=precision.qk,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return KeysValues(
        k_out,
        k_scales,
        v_out,
        v_scales,
        bias_out if key_bias is not None else None,
        pooled_k if tail else None,
        pooled_scales if tail else None,
        pooled_v if tail else None,
        rotation,
        q_staged,
        q_scales,
    )


def _sampled_rows(length: int, every: int) -> int:
    """Rows in every `every`-th block of 64, the last of which may be short."""
    last = (length - 1) // (64 * every)
    return last * 64 + min(64, length - last * 64 * every)


def _padded_rows(tokens: int) -> int:
    """Rows of whole query tiles, whichever tile is used."""
    return triton.cdiv(tokens, LARGEST_TILE) * LARGEST_TILE


def _kernel_pv(precision: Precision) -> str:
    """INT4 values are computed on the INT8 path: 4-bit accuracy, 8-bit speed."""
    return "int8" if precision.pv == "int4" else precision.pv


def forward(
    q: torch.Tensor,
    prepared: KeysValues,
    pattern: SparsePattern,
    lists: BlockList | None,
    precision: Precision,
    scale: float,
    out: torch.Tensor,
    tile: Tile,
) -> None:
    """The attention kernel alone, on what `prepare` left; writes `out`."""
    g = pattern.geometry
    batch, heads, length, dim = q.shape
    block_q = g.block_q if lists is not None else tile.rows
    q_blocks_grid = triton.cdiv(g.grid_tokens, block_q)
    q_blocks = q_blocks_grid + context_blocks(g.context_tokens, block_q)
    tail = prepared.pooled_k is not None
    rotation_scale = (dim & -dim) ** -0.5 if prepared.rotation is not None else 1.0
    listed = (None,) * 6 if lists is None else (
        lists.head_order, lists.row_order, lists.start, lists.full, lists.count, lists.blocks,
    )  # fmt: skip
    attention_forward[(batch * heads * q_blocks * (block_q // tile.rows),)](
        q, out, prepared.q_staged, prepared.q_scales, prepared.k, prepared.v, prepared.k_scales, prepared.v_scales,
        # A kernel without a bias still forms the address.
        prepared.k_scales if prepared.key_bias is None else prepared.key_bias,
        prepared.pooled_k, prepared.pooled_v, prepared.pooled_scales, pattern.tail_bias,
        None if lists is None else lists.kept_words,
        pattern.tables, pattern.order_of_head, prepared.rotation, *listed,
        *q.stride(), *out.stride(),
        heads, heads // pattern.kv_heads, g.grid_tokens, g.prefix, length, q_blocks, q_blocks_grid,
        prepared.k.shape[1], g.k_blocks, triton.cdiv(g.grid_tokens, pattern.pool),
        scale * math.log2(math.e) * rotation_scale,
        D=dim, PADDED_D=padded_dim(dim), ROWS=tile.rows, BLOCK_Q=block_q, PAIRS=tile.pairs,
        QK=precision.qk, PV=_kernel_pv(precision), P_LOG2=P_LOG2[precision.pv], LISTED=lists is not None, TAIL=tail,
        POOL=pattern.pool, BIASED=prepared.key_bias is not None, ROTATE=prepared.rotation is not None,
        VALUES_SCALED=prepared.v_scales is not None,
        SEPARATE_TAIL=needs_separate_tail(_capability(q.device), precision.pv),
        HALVES=in_channel_halves(_capability(q.device), tile, padded_dim(dim)), STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _capability(device: torch.device) -> tuple[int, int] | None:
    """The GPU's compute capability; None on AMD. The interpreter stands in for the oldest GPU."""
    if device.type != "cuda":
        return LOWEST_CAPABILITY
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


def launch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: SparsePattern,
    precision: Precision,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The Triton counterpart of `reference.sparse_attention_reference`; the call has been checked.

    When the scratch memory does not fit, the heads are done in halves, quarters, ... and at last one by one; if even
    that fails, raises ScratchOutOfMemory.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lists = None if pattern.mask is None else block_list(pattern)
    tile = tile or tile_for(
        _capability(q.device), padded_dim(q.shape[3]), precision.qk, precision.pv, pattern.geometry.block_q,
        lists is not None,
    )  # fmt: skip
    group = q.shape[1] // k.shape[1]
    heads = k.shape[1]
    while True:
        try:
            for first in range(0, k.shape[1], heads):
                kv = slice(first, first + heads)
                rows = slice(first * group, (first + heads) * group)
                whole = heads >= k.shape[1]
                part = pattern if whole else _heads_of(pattern, kv, rows)
                part_lists = lists if whole or lists is None else lists.of_heads(rows)
                prepared = prepare(q[:, rows], k[:, kv], v[:, kv], part, precision, key_bias)
                forward(q[:, rows], prepared, part, part_lists, precision, scale, out[:, rows], tile)
            return out
        except torch.OutOfMemoryError as error:
            release_scratch()
            if heads == 1:
                raise ScratchOutOfMemory("scratch memory of the attention does not fit for a single head") from error
            heads = -(-heads // 2)
            log.info("scratch memory does not fit: attention in groups of %d key heads", heads)


def _heads_of(pattern: SparsePattern, kv: slice, rows: slice) -> SparsePattern:
    return SparsePattern(
        pattern.geometry,
        pattern.tables,
        pattern.order_of_head[kv],
        None if pattern.mask is None else pattern.mask[rows],
        None if pattern.tail_bias is None else pattern.tail_bias[rows],
        pattern.pool,
    )
