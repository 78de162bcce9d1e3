"""The tail's error: what a dropped block costs when its pooled key and value stand for it, and which bias costs least.

Everything is measured on sampled query rows against the exact output of those rows, with the values, because mass alone
misleads in both directions: a block whose values resemble the output costs nothing though its mass is large, and where
a head follows content rather than place, a tail with the right mass pulls the output towards the wrong mean.

For one row with exact output o, a key block j contributes x_j = sum_k p_k (v_k - o), and its pool y_j = p'_j (v'_j - o)
with p' the pooled weight and v' the pooled value. Keeping a set of blocks and giving the rest a tail with factor e^c
moves the row's output by (e^c sum y_j - sum x_j) / (mass kept + e^c pooled mass), sums over the dropped blocks. So a
block costs |e^c y_j - x_j|^2, and the error of every bias follows from three numbers per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.problem import Geometry
from ..kernels.reference import pool_counts, pool_rows

# Rows looked at in every query block.
ROWS_PER_BLOCK = 16
# Elements of one chunk of per-block contributions: bounds the scratch memory to some hundred MB, and to about 1 GB on a
# GPU, where small chunks would spend their time in launches.
CHUNK_ELEMENTS = 1 << 24
CHUNK_ELEMENTS_GPU = 1 << 26
# Biases that are tried. The first leaves no tail at all: some heads are better off without one.
NO_TAIL = -20.0
BIASES = (NO_TAIL, *(i / 4 for i in range(-10, 21)))
# The mask is not known yet when the blocks are measured, so biases are tried under masks of these shares of the blocks.
MASK_DENSITIES = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class TailObservation:
    """Squared errors, in units of the squared output, summed over rows and channels; mean over the batch.

    error  float32 [H, q_blocks, k_blocks]: of leaving a block to the tail, estimated for all of the block's rows.
    curves float32 [H, len(MASK_DENSITIES), len(BIASES)]: of the whole output, over the sampled rows.
    energy float32 [H]: squared output itself over the sampled rows.
    """

    error: torch.Tensor
    curves: torch.Tensor
    energy: torch.Tensor


def sampled_rows(geometry: Geometry, device: torch.device, rows: int = ROWS_PER_BLOCK) -> torch.Tensor:
    """Positions in the order, int64 `[q_blocks, rows]`, spread evenly over each block, or what there is of it."""
    starts = torch.arange(geometry.q_blocks, device=device) * geometry.block_q
    size = (geometry.grid_tokens - starts).clamp_max(geometry.block_q)
    return starts[:, None] + ((torch.arange(rows, device=device) + 0.5) / rows * size[:, None]).long()


@dataclass(frozen=True)
class _Head:
    """One head of one batch entry, keys and values of the grid in the head's order."""

    q: torch.Tensor
    all_keys: torch.Tensor
    key_bias: torch.Tensor | None
    values: torch.Tensor
    context_values: torch.Tensor
    pooled_keys: torch.Tensor
    pooled_values: torch.Tensor
    log_counts: torch.Tensor
    columns: torch.Tensor
    context: torch.Tensor
    scale: float


def _context_index(g: Geometry, device) -> torch.Tensor:
    return torch.cat(
        [torch.arange(g.prefix, device=device), torch.arange(g.prefix + g.grid_tokens, g.length, device=device)]
    )


def _head(q, k, v, bias, g: Geometry, table: torch.Tensor, pool: int, scale: float) -> _Head:
    columns, context = table.long() + g.prefix, _context_index(g, q.device)
    keys, values = k[columns].float(), v[columns].float()
    log_counts = pool_counts(g.grid_tokens, pool, q.device).float().log()
    return _Head(
        q,
        k.float(),
        bias,
        values,
        v[context].float(),
        pool_rows(keys, pool),
        pool_rows(values, pool),
        log_counts,
        columns,
        context,
        scale,
    )


def _blocks(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Split dimension `dim` into blocks of `size`, the last one padded with zeros."""
    missing = -x.shape[dim] % size
    if missing:
        shape = list(x.shape)
        shape[dim] = missing
        x = torch.cat([x, x.new_zeros(shape)], dim)
    return x.unflatten(dim, (-1, size))


@dataclass(frozen=True)
class _Rows:
    """x and y `[rows, k_blocks, D]`, mass and pooled `[rows, k_blocks]`, energy `[rows]` of sampled rows."""

    x: torch.Tensor
    y: torch.Tensor
    mass: torch.Tensor
    pooled: torch.Tensor
    energy: torch.Tensor


def _rows(head: _Head, g: Geometry, pool: int, positions: torch.Tensor) -> _Rows:
    queries = head.q[head.columns[positions]].float() * head.scale
    logits = queries @ head.all_keys.T
    if head.key_bias is not None:
        logits += head.key_bias.float()
    lse = logits.logsumexp(1, keepdim=True)
    weights = (logits - lse).exp()
    on_grid, on_context = weights[:, head.columns], weights[:, head.context]
    out = on_grid @ head.values + on_context @ head.context_values
    tiles = _blocks(on_grid, g.block_k, 1)
    mass = tiles.sum(2)
    sums = torch.einsum("rbk,bkd->rbd", tiles, _blocks(head.values, g.block_k, 0))
    pooled_weights = (queries @ head.pooled_keys.T + head.log_counts - lse).exp()
    per_block = g.block_k // pool
    pooled_tiles = _blocks(pooled_weights, per_block, 1)
    pooled = pooled_tiles.sum(2)
    pooled_sums = torch.einsum("rbk,bkd->rbd", pooled_tiles, _blocks(head.pooled_values, per_block, 0))
    x = sums - mass[..., None] * out[:, None]
    y = pooled_sums - pooled[..., None] * out[:, None]
    return _Rows(x, y, mass, pooled, out.square().sum(1))


def _bias_errors(rows: _Rows, kept: torch.Tensor) -> torch.Tensor:
    """Squared error over all rows for each of BIASES; kept bool `[rows, k_blocks]`."""
    dropped = (~kept).float()
    x = torch.einsum("rb,rbd->rd", dropped, rows.x)
    y = torch.einsum("rb,rbd->rd", dropped, rows.y)
    factor = torch.tensor(BIASES, device=x.device).exp()[:, None]
    moved = x.square().sum(1) - 2 * factor * (x * y).sum(1) + factor.square() * y.square().sum(1)
    total = 1 - (dropped * rows.mass).sum(1) + factor * (dropped * rows.pooled).sum(1)
    return (moved / total.clamp_min(1e-6).square()).sum(1)


def _small_block_factor(rows: _Rows, density: float) -> torch.Tensor:
    """e^c that makes the total right over the blocks that a mask of this density would leave to the tail."""
    count = min(rows.mass.shape[1], 1 + round(density * rows.mass.shape[1]))
    small = rows.mass < rows.mass.topk(count, 1).values[:, -1:]
    return ((rows.mass * small).sum() / (rows.pooled * small).sum().clamp_min(1e-12)).clamp(0.3, 30)


def _chunk_elements(q: torch.Tensor) -> int:
    return CHUNK_ELEMENTS_GPU if q.is_cuda else CHUNK_ELEMENTS


def observe_tail(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    *,
    density: float,
    pool: int,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    rows: int = ROWS_PER_BLOCK,
) -> TailObservation:
    """What each block costs and which bias suits; q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]`, tables int `[Hq, N]`.

    tables: grid index at each position of the head's order. Costs rows / block_q of a dense attention.
    """
    g, (batch, heads, _, dim) = geometry, q.shape
    scale = dim**-0.5 if scale is None else scale
    error = torch.zeros(heads, g.q_blocks, g.k_blocks, device=q.device)
    curves = torch.zeros(heads, len(MASK_DENSITIES), len(BIASES), device=q.device)
    energy = torch.zeros(heads, device=q.device)
    positions = sampled_rows(g, q.device, rows)
    size = (g.grid_tokens - torch.arange(g.q_blocks, device=q.device) * g.block_q).clamp_max(g.block_q)
    step = max(1, _chunk_elements(q) // (rows * g.k_blocks * dim))
    group = heads // k.shape[1]
    for b in range(batch):
        bias = None if key_bias is None else key_bias[b]
        for h in range(heads):
            head = _head(q[b, h], k[b, h // group], v[b, h // group], bias, g, tables[h], pool, scale)
            for first in range(0, g.q_blocks, step):
                part = slice(first, min(first + step, g.q_blocks))
                seen = _rows(head, g, pool, positions[part].flatten())
                cost = (_small_block_factor(seen, density) * seen.y - seen.x).square().sum(2)
                per_block = cost.unflatten(0, (-1, rows)).mean(1)
                error[h, part] += per_block * size[part, None] / batch
                energy[h] += seen.energy.sum() / batch
                for i, share in enumerate(MASK_DENSITIES):
                    count = max(1, round(share * g.k_blocks))
                    best = per_block.topk(count, 1).indices
                    kept = torch.zeros_like(per_block, dtype=torch.bool).scatter_(1, best, True)
                    curves[h, i] += _bias_errors(seen, kept.repeat_interleave(rows, 0)) / batch
    return TailObservation(error, curves, energy)


def observe_bias(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    mask: torch.Tensor,
    *,
    pool: int,
    share: float,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared error for each of BIASES under a known mask, from a share of the rows: float32 `[Hq, len(BIASES)]`.

    Arguments as in `observe_tail`; mask bool `[Hq, q_blocks, k_blocks]`. At least 64 rows are looked at.
    """
    g, (batch, heads, _, dim) = geometry, q.shape
    scale = dim**-0.5 if scale is None else scale
    count = min(g.grid_tokens, max(64, round(share * g.grid_tokens)))
    positions = ((torch.arange(count, device=q.device) + 0.5) / count * g.grid_tokens).long()
    result = torch.zeros(heads, len(BIASES), device=q.device)
    group = heads // k.shape[1]
    step = max(1, _chunk_elements(q) // (g.k_blocks * dim))
    for b in range(batch):
        bias = None if key_bias is None else key_bias[b]
        for h in range(heads):
            head = _head(q[b, h], k[b, h // group], v[b, h // group], bias, g, tables[h], pool, scale)
            for part in positions.split(step):
                seen = _rows(head, g, pool, part)
                result[h] += _bias_errors(seen, mask[h, part // g.block_q]) / batch
    return result


def best_bias(errors: torch.Tensor) -> torch.Tensor:
    """The bias of least error, float32 `[...]` from errors `[..., len(BIASES)]`, refined between the values tried."""
    values = torch.tensor(BIASES, device=errors.device)
    at = errors.argmin(-1)
    inner = at.clamp(2, len(BIASES) - 2)
    left, middle, right = (errors.gather(-1, (inner + d)[..., None])[..., 0] for d in (-1, 0, 1))
    bend = (left + right - 2 * middle).clamp_min(1e-20)
    shift = ((left - right) / (2 * bend)).clamp(-0.5, 0.5) * (values[3] - values[2])
    return values[at] + shift.where(at == inner, 0)


def bias_at(curves: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
    """Bias per head for the density its mask came to: curves `[H, len(MASK_DENSITIES), len(BIASES)]`, density `[H]`.

    Between two densities the errors are mixed in proportion to the logarithm of the density.
    """
    points = torch.tensor(MASK_DENSITIES, device=curves.device).log()
    place = density.clamp(MASK_DENSITIES[0], MASK_DENSITIES[-1]).log()
    upper = torch.searchsorted(points, place.contiguous()).clamp(1, len(MASK_DENSITIES) - 1)
    part = ((place - points[upper - 1]) / (points[upper] - points[upper - 1]))[:, None]
    rows = torch.arange(curves.shape[0], device=curves.device)
    return best_bias(curves[rows, upper - 1] * (1 - part) + curves[rows, upper] * part)


def kept_on_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    geometry: Geometry,
    tables: torch.Tensor,
    mask: torch.Tensor,
    *,
    rows: int = 256,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Share of each head's grid attention inside a mask, from evenly spread rows: float32 `[Hq]`.

    Arguments as in `observe_bias`. Costs rows / L of a product Q K^T.
    """
    g, (batch, heads, _, dim) = geometry, q.shape
    scale = dim**-0.5 if scale is None else scale
    count = min(g.grid_tokens, rows)
    positions = ((torch.arange(count, device=q.device) + 0.5) / count * g.grid_tokens).long()
    kept = torch.zeros(2, heads, device=q.device)
    group = heads // k.shape[1]
    for b in range(batch):
        for h in range(heads):
            columns = tables[h].long() + g.prefix
            logits = q[b, h, columns[positions]].float() * scale @ k[b, h // group].float().T
            if key_bias is not None:
                logits += key_bias[b].float()
            blocks = _blocks(logits.softmax(1)[:, columns], g.block_k, 1).sum(2)
            kept[0, h] += (blocks * mask[h, positions // g.block_q]).sum()
            kept[1, h] += blocks.sum()
    return kept[0] / kept[1].clamp_min(1e-20)
