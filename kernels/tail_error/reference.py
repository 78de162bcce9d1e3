"""What dropped blocks cost on sampled rows, in plain PyTorch: the reference for `triton_block_costs` and
`triton_row_errors`.

For one row with exact output o, a key block j contributes x_j = sum_k p_k (v_k - o), and its pools
y_j = sum_i p'_i (v'_i - o), with p' the weight and v' the value of a pooled key (`pooling.reference`). Leaving a
block to a tail with factor f moves the row's output by f y_j - x_j (before it is normalised again), so squares and the
product of x and y tell the error of every factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.gather import blocks_of, context_index
from ..core.inputs import AttentionInputs
from ..core.layout import Geometry
from ..pooling.reference import Pools, expanded_pools, mean_queries, stretch_of_rows

# Elements of one chunk of per-block contributions: what a CPU's cache holds a few times; on a GPU some hundred MB.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_ON_GPU = 1 << 18, 1 << 24


@dataclass(frozen=True)
class BlockCosts:
    """Sums over the sampled rows of each query block, mean over the batch; float32 `[H, q_blocks, k_blocks]`.

    moved |x|^2, cross x.y, pooled_moved |y|^2: of each block. mass, pooled: attention in the block, and what its pooled
    keys would have. energy float32 [H]: |o|^2 over all sampled rows.
    """

    moved: torch.Tensor
    cross: torch.Tensor
    pooled_moved: torch.Tensor
    mass: torch.Tensor
    pooled: torch.Tensor
    energy: torch.Tensor


@dataclass(frozen=True)
class RowMoments:
    """Per row, with X and Y the sums of x and y over the blocks that a mask drops; float32 `[B, H, masks, rows]`.

    moved |X|^2, cross X.Y, pooled_moved |Y|^2; mass, pooled: attention in the dropped blocks and of their pooled keys.
    out: the rows' exact output, float32 `[B, H, rows, D]`.
    """

    moved: torch.Tensor
    cross: torch.Tensor
    pooled_moved: torch.Tensor
    mass: torch.Tensor
    pooled: torch.Tensor
    out: torch.Tensor


def _chunk_elements(q: torch.Tensor) -> int:
    return CHUNK_ELEMENTS_ON_GPU if q.is_cuda else CHUNK_ELEMENTS


@dataclass(frozen=True)
class _Head:
    """One head of one batch entry in float32 or float64: keys and values in the head's order, zeros up to whole blocks,
    then the context.

    q `[N, D]` of the grid, in natural order, times the scale; keys `[k_blocks * block_k + context, D]`; key_bias, one
    for each of them, or None; value_blocks `[k_blocks, block_k, D]`, context_values `[context, D]`; pools: of one
    entry and head; table int64 `[N]`.
    """

    q: torch.Tensor
    keys: torch.Tensor
    key_bias: torch.Tensor | None
    value_blocks: torch.Tensor
    context_values: torch.Tensor
    pools: Pools
    table: torch.Tensor


def _head(inputs: AttentionInputs, entry: int, head: int, pool: int, expansions: int) -> _Head:
    """Of batch entry `entry` and query head `head`."""
    g, table = inputs.geometry, inputs.tables[head].long()
    q, k, v = inputs.q[entry, head], inputs.k[entry, head // inputs.group], inputs.v[entry, head // inputs.group]
    bias = None if inputs.key_bias is None else inputs.key_bias[entry]
    context = context_index(g, q.device)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = (x.index_select(0, table + g.prefix).to(work) for x in (k, v))
    key_blocks, value_blocks = (blocks_of(x, g.block_k, 0) for x in (keys, values))
    # The queries are scaled already.
    q = q[g.prefix : g.prefix + g.grid_tokens].to(work) * inputs.score_scale
    means = mean_queries(q, g, expansions, table)
    grid_bias = None if bias is None else bias[table + g.prefix].to(work)[None, None]
    pools = expanded_pools(means[None, None], keys[None, None], values[None, None], pool, scale=1.0, key_bias=grid_bias)
    if bias is not None:
        bias = torch.cat([blocks_of(bias[table + g.prefix], g.block_k, 0).flatten(), bias[context]]).to(work)
    return _Head(
        q,
        torch.cat([key_blocks.flatten(0, 1), k[context].to(work)]),
        bias,
        value_blocks,
        v[context].to(work),
        pools,
        table,
    )


@dataclass(frozen=True)
class _Rows:
    """x and y `[k_blocks, rows, D]`, mass and pooled `[rows, k_blocks]`, out `[rows, D]`."""

    x: torch.Tensor
    y: torch.Tensor
    mass: torch.Tensor
    pooled: torch.Tensor
    out: torch.Tensor


def _rows(head: _Head, g: Geometry, pool: int, positions: torch.Tensor) -> _Rows:
    queries = head.q.index_select(0, head.table[positions])
    logits = queries @ head.keys.T
    if head.key_bias is not None:
        logits += head.key_bias
    padded = g.k_blocks * g.block_k
    logits[:, g.grid_tokens : padded] = -torch.inf
    # Written out, since logsumexp makes a second pass of exponentials.
    highest = logits.amax(1, keepdim=True)
    weights = logits.sub_(highest).exp_()
    total = weights.sum(1, keepdim=True)
    weights /= total
    tiles = weights[:, :padded].unflatten(1, (-1, g.block_k))
    mass = tiles.sum(2)
    sums = tiles.transpose(0, 1) @ head.value_blocks
    out = sums.sum(0) + weights[:, padded:] @ head.context_values
    pools, per_block = head.pools, g.block_k // pool
    keys, values, bias = (x[0, 0] for x in (pools.keys, pools.values, pools.bias))
    if keys.shape[0] == 1:
        pooled_logits, values = queries @ keys[0].T, values[0][None]
    else:
        # Each row has pools of its own: few rows come here, and what is taken is no larger than x.
        stretch = stretch_of_rows(g, keys.shape[0], positions)
        keys, values, bias = (x.index_select(0, stretch) for x in (keys, values, bias))
        pooled_logits = (keys * queries[:, None]).sum(2)
    pooled_weights = (pooled_logits + bias - highest).exp_() / total
    pooled_tiles = blocks_of(pooled_weights, per_block, 1)
    pooled = pooled_tiles.sum(2)
    values = blocks_of(values, per_block, 1).transpose(0, 1)
    # With one pool a block, a product of one column and one row: cheaper as a plain multiplication.
    if per_block == 1:
        pooled_sums = pooled_tiles.transpose(0, 1) * values[:, :, 0]
    else:
        pooled_sums = torch.einsum(
            "jrp,jrpd->jrd", pooled_tiles.transpose(0, 1), values.expand(-1, len(queries), -1, -1)
        )
    x = sums.addcmul_(mass.T[..., None], out, value=-1)
    y = pooled_sums.addcmul_(pooled.T[..., None], out, value=-1)
    return _Rows(x, y, mass, pooled, out)


def block_costs_reference(
    inputs: AttentionInputs, positions: torch.Tensor, *, pool: int, expanded: bool = False
) -> BlockCosts:
    """What each block and its pools contribute to sampled rows.

    positions int64 `[q_blocks, rows]`: places in the order, rows of each query block. pool: tokens per pooled key,
    divides block_k. expanded: pools are expanded around one mean query per head, whatever the tail has: which blocks
    are worth keeping hardly depends on more, and one is cheap.
    """
    g, q = inputs.geometry, inputs.q
    batch, heads, _, dim = q.shape
    tables_of_costs = torch.zeros(5, heads, g.q_blocks, g.k_blocks, device=q.device)
    energy = torch.zeros(heads, device=q.device)
    rows = positions.shape[1]
    step = max(1, _chunk_elements(q) // (rows * g.k_blocks * dim))
    for b in range(batch):
        for h in range(heads):
            head = _head(inputs, b, h, pool, int(expanded))
            for first in range(0, g.q_blocks, step):
                part = slice(first, min(first + step, g.q_blocks))
                seen = _rows(head, g, pool, positions[part].flatten())
                moved, other = (torch.linalg.vector_norm(each, dim=2).square() for each in (seen.x, seen.y))
                cross = seen.x.mul_(seen.y).sum(2)
                found = torch.stack([moved.T, cross.T, other.T, seen.mass, seen.pooled])
                found = found.unflatten(1, (-1, rows)).sum(2)
                tables_of_costs[:, h, part] += (found / batch).float()
                energy[h] += seen.out.square().sum() / batch
    moved, cross, pooled_moved, mass, pooled = tables_of_costs
    return BlockCosts(moved, cross, pooled_moved, mass, pooled, energy)


def row_moments_reference(
    inputs: AttentionInputs,
    positions: torch.Tensor,
    levels: torch.Tensor,
    masks: int,
    *,
    pool: int,
    expansions: int = 0,
) -> RowMoments:
    """What the dropped blocks of several nested masks contribute to sampled rows.

    positions int64 `[rows]`: places in the order. levels uint8 `[Hq, q_blocks, k_blocks]`: mask i of `masks` drops the
    blocks whose level is above i. pool: tokens per pooled key, divides block_k. expansions: mean queries per head at
    most around which the pools are expanded, 0 for plain means.
    """
    g, q = inputs.geometry, inputs.q
    batch, heads, _, dim = q.shape
    result = torch.zeros(5, batch, heads, masks, positions.numel(), device=q.device)
    exact = torch.zeros(batch, heads, positions.numel(), dim, device=q.device)
    step = max(1, _chunk_elements(q) // (g.k_blocks * dim))
    for b in range(batch):
        for h in range(heads):
            head = _head(inputs, b, h, pool, expansions)
            for first in range(0, positions.numel(), step):
                part = slice(first, first + step)
                seen = _rows(head, g, pool, positions[part])
                level = levels[h, positions[part] // g.block_q]
                dropped = torch.stack([(level > mask).to(seen.x.dtype) for mask in range(masks)], 1)
                x, y = (dropped @ each.transpose(0, 1) for each in (seen.x, seen.y))
                found = [x.square().sum(2), (x * y).sum(2), y.square().sum(2)]
                found += [(dropped @ each[..., None])[..., 0] for each in (seen.mass, seen.pooled)]
                result[:, b, h, :, part] = torch.stack(found).transpose(1, 2).float()
                exact[b, h, part] = seen.out.float()
    moved, cross, pooled_moved, mass, pooled = result
    return RowMoments(moved, cross, pooled_moved, mass, pooled, exact)
