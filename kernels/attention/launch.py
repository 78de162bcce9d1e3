"""Launches the pre-pass and the attention kernel for one call. Importing this module needs Triton."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from ..core.pattern import SparsePattern, empty_output
from ..core.precision import Precision
from ..core.scratch import ScratchOutOfMemory, allocate, release_scratch
from ..core.support import capability_of, form_of
from ..core.triton_gather import LOG2E
from ..pooling.triton_pools import launch_mean_queries
from ..pooling.triton_quantized_pools import store_pools
from .block_lists import BlockList, block_list
from .gluon_sm90 import launch as gluon_launch
from .launch_plan import Call, CallKey, call_of, parts_of, rotation_matrix
from .tiles import Tile
from .triton_block_lists import write_lists
from .triton_forward import attention_forward
from .triton_prepare import channel_statistics, finish_statistics, prepare_keys_values

log = logging.getLogger("paro")


@dataclass(frozen=True)
class Piece:
    """The heads of a call that are done together, all of them if they fit: how, and on what."""

    call: Call
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    order_of_head: torch.Tensor
    tail_bias: torch.Tensor | None
    kept_words: torch.Tensor | None
    lists: BlockList | None

    def listed(self, prepared: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """The lists as the kernels take them: head_order, row_order, start, full, count, blocks; None without a mask.

        prepared: what `prepare` left.
        """
        lists = self.lists
        if lists is None:
            return (None,) * 6
        blocks = prepared["blocks"] if lists.blocks is None else lists.blocks
        return lists.head_order, lists.row_order, lists.start, lists.full, lists.count, blocks


def pieces_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    pattern: SparsePattern,
    precision: Precision,
    *,
    biased: bool = False,
    tile: Tile | None = None,
    most: int | None = None,
) -> list[Piece]:
    """The call in groups of at most `most` key heads that respect the scratch budget (see `launch_plan.parts_of`)."""
    batch, kv_heads, _, dim = k.shape
    words = pattern.kept_words
    lists = None if words is None else block_list(pattern)
    bias = None if lists is None else pattern.tail_bias
    form = form_of(lists is not None, bias is not None)
    gluon = q.stride(3) == 1 and gluon_launch.why_unwanted(dim, precision, form) is None
    key = CallKey(
        batch, kv_heads, q.shape[1] // kv_heads, dim, q.dtype, capability_of(q.device), pattern.geometry, precision,
        pattern.pool, bias is not None, biased, lists is not None, lists is not None and lists.blocks is None, tile,
        gluon, pattern.expansions if bias is not None else 0,
    )  # fmt: skip
    parts = parts_of(key, most or kv_heads)
    if len(parts) == 1:
        return [Piece(parts[0].call, q, k, v, out, pattern.order_of_head, bias, words, lists)]
    return [
        Piece(
            part.call,
            q[:, part.rows],
            k[:, part.kv],
            v[:, part.kv],
            out[:, part.rows],
            pattern.order_of_head[part.kv],
            None if bias is None else bias[part.rows],
            None if words is None else words[part.rows],
            None if lists is None else lists.of_heads(part.rows),
        )
        for part in parts
    ]


def prepare(
    piece: Piece, pattern: SparsePattern, scale: float, key_bias: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Reorder, smooth, rotate, quantise and pool K and V `[B, Hkv, L, D]` into scratch memory, and write the lists of
    kept blocks where none are kept; returns its tensors. scale: of the scores, around which pools are expanded."""
    call, k, v, g = piece.call, piece.k, piece.v, pattern.geometry
    s = allocate(call.scratch, k.device)
    heads = k.shape[1]
    rotation = rotation_matrix(k.shape[3], k.device, k.dtype) if call.rotate else None
    if call.key.lists:
        write_lists(piece.kept_words, g, s["blocks"])
    if call.smooth or call.values_scaled:
        channel_statistics[call.statistics_grid](
            k, v, s["sums"], s["largest"], *k.stride(), *v.stride(), g.length, heads, **call.statistics_options
        )
        if not call.few_chunks:
            finish_statistics[call.finish_grid](
                s["sums"], s["largest"], rotation, s["k_means"], s["v_scales"], call.chunks, call.sampled_rows,
                call.rotation_scale, **call.finish_options,
            )  # fmt: skip
    prepare_keys_values[call.prepare_grid](
        k, v, key_bias, s["k"], s["v"], s["key_bias"], s["k_scales"], s["sums"], s["largest"], s["k_means"],
        s["v_scales"], pattern.tables, piece.order_of_head, rotation,
        *k.stride(), *v.stride(), 0 if key_bias is None else key_bias.stride(0),
        heads, g.grid_tokens, g.prefix, g.length, call.blocks, g.k_blocks, call.chunks, call.sampled_rows,
        call.rotation_scale, **call.prepare_options,
    )  # fmt: skip
    if call.key.tail:
        _prepare_pools(piece, pattern, s, scale, key_bias, rotation)
    return s


def _prepare_pools(piece, pattern, s, scale, key_bias, rotation) -> None:
    """The tail's pools, around each query head's mean queries; behind what leaves mean keys and value scales."""
    call, q, k, v, g = piece.call, piece.q, piece.k, piece.v, pattern.geometry
    group, means = q.shape[1] // k.shape[1], None
    if call.key.expansions:
        means = s["mean_queries"]
        launch_mean_queries(q, g, pattern.tables, piece.order_of_head, means, table_group=group)
    store_pools[call.pools_grid](
        k, v, key_bias, pattern.tables, piece.order_of_head, rotation, means, s["k_means"], s["v_scales"],
        s["pooled_k"], s["pooled_v"], s["pooled_scales"], s["pool_bias"],
        *k.stride(), *v.stride(), 0 if key_bias is None else key_bias.stride(0),
        q.shape[1], group, g.grid_tokens, g.prefix, call.pools, call.stretches, scale * LOG2E, call.rotation_scale,
        **call.pools_options,
    )  # fmt: skip


def forward(
    piece: Piece,
    prepared: dict[str, torch.Tensor],
    pattern: SparsePattern,
    scale: float,
    nonfinite: torch.Tensor | None = None,
) -> None:
    """The attention kernel alone, on what `prepare` left; writes `piece.out`, whose channels must be contiguous."""
    scale_log2 = scale * LOG2E * piece.call.rotation_scale
    if piece.call.gluon:
        if gluon_launch.launch(piece, prepared, pattern, scale_log2, nonfinite):
            return
        piece = replace(piece, call=call_of(replace(piece.call.key, gluon=False)))
    call, q, out, s, g = piece.call, piece.q, piece.out, prepared, pattern.geometry
    heads = q.shape[1]
    rotation = rotation_matrix(q.shape[3], q.device, q.dtype) if call.rotate else None
    attention_forward[call.attention_grid](
        q, out, nonfinite, s["q_scales"], s["q_excess"], s["k"], s["v"], s["k_scales"], s["v_scales"], s["key_bias"],
        s["pooled_k"], s["pooled_v"], s["pooled_scales"], s["pool_bias"], piece.tail_bias, pattern.tables,
        piece.order_of_head, rotation, piece.kept_words, *piece.listed(s), *q.stride(), *out.stride()[:3],
        heads, heads // piece.k.shape[1], g.grid_tokens, g.prefix, g.length, call.q_blocks, call.q_blocks_grid,
        call.blocks, g.k_blocks, call.pools, call.stretches, scale_log2, **call.attention_options,
    )  # fmt: skip


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
    nonfinite: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The Triton counterpart of `reference.sparse_attention_reference`; the call has been checked.

    The heads are done in groups whose scratch memory stays within `scratch.BUDGET`. When even that does not fit, in
    halves, quarters, ... and at last one by one; if that fails too, raises ScratchOutOfMemory.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    direct = out is not None and out.stride(3) == 1
    written = out if direct else empty_output(q)
    most = k.shape[1]
    while True:
        try:
            for piece in pieces_of(
                q, k, v, written, pattern, precision, biased=key_bias is not None, tile=tile, most=most
            ):
                forward(piece, prepare(piece, pattern, scale, key_bias), pattern, scale, nonfinite)
            return written if direct or out is None else out.copy_(written)
        except torch.OutOfMemoryError as error:
            release_scratch()
            if most == 1:
                raise ScratchOutOfMemory("scratch memory of the attention does not fit for a single head") from error
            most = -(-most // 2)
            log.info("scratch memory does not fit: attention in groups of at most %d key heads", most)
