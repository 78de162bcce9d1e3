"""The tail's error: what a dropped block costs when its pooled key and value stand for it, and which bias costs least.

Everything is measured on sampled query rows against the exact output of those rows, with the values, because mass alone
misleads in both directions: a block whose values resemble the output costs nothing though its mass is large, and where
a head follows content rather than place, a tail with the right mass pulls the output towards the wrong mean.

For one row with exact output o, a key block j contributes x_j = sum_k p_k (v_k - o), its pool y_j = p'_j (v'_j - o),
with p' the pooled weight and v' the pooled value (`kernels.tail_error.reference`). Keeping a set of blocks and
giving the others a tail with factor e^c moves the row's output by (e^c sum y_j - sum x_j) / (mass kept + e^c pooled
mass), sums over the dropped blocks. So a block costs |e^c y_j - x_j|^2, and the error of every bias follows
from five numbers per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...kernels.core.gather import block_sizes
from ...kernels.core.inputs import AttentionInputs
from ...kernels.core.pattern import MOST_EXPANSIONS
from ...kernels.core.sampling import ROWS_PER_BLOCK, head_groups, sampled_rows, spread_positions
from ...kernels.tail_error.api import block_costs, row_moments
from ...kernels.tail_error.reference import RowMoments

# Biases are tried on CURVE_ROWS rows of so many query blocks, evenly spread: one number per head needs no more. On the
# tiny model's first and third step, densities 0.1 and 0.3, the bias from 4 rows has the error of that from 16 within
# 0.8 %; from 8 rows within 1.8 %, so that is chance.
CURVE_BLOCKS, CURVE_ROWS = 64, 4
# Biases that are tried. The first leaves no tail at all: some heads are better off without one.
NO_TAIL = -20.0
BIASES = (NO_TAIL, *(i / 4 for i in range(-10, 21)))
# The mask is not known yet when the blocks are measured, so biases are tried under masks of these shares of the blocks.
MASK_DENSITIES = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class TailObservation:
    """Squared errors, in units of the squared output, summed over rows and channels; mean over the batch.

    curves float32 [H, len(MASK_DENSITIES), len(BIASES)]: of the whole output, over CURVE_ROWS rows of some blocks; None
           where biases were not tried.
    error  float32 [H, q_blocks, k_blocks]: of leaving a block to the tail, estimated for all of the block's rows.
    mass   float32 [H, q_blocks, k_blocks]: attention in each block, likewise estimated.
    energy float32 [H]: squared output itself over the sampled rows.
    All but the curves are None where single blocks were not measured.
    """

    curves: torch.Tensor | None
    error: torch.Tensor | None = None
    mass: torch.Tensor | None = None
    energy: torch.Tensor | None = None


@dataclass(frozen=True)
class BiasObservation:
    """errors float32 `[Hq, len(BIASES)]`: squared error of each bias, over the rows, mean over the batch. rows int64
    `[Hq, R]`: which tokens they are. exact float32 `[B, Hq, R, D]`: their exact output."""

    errors: torch.Tensor
    rows: torch.Tensor
    exact: torch.Tensor


@lru_cache(maxsize=16)
def _biases(device: torch.device) -> torch.Tensor:
    """BIASES as float32; kept, since bringing them to a GPU waits for all that was launched before."""
    return torch.tensor(BIASES, device=device)


def _bias_errors(seen: RowMoments) -> torch.Tensor:
    """Squared error of each of BIASES over all rows, mean over the batch: float32 `[H, masks, len(BIASES)]`."""
    factor = _biases(seen.moved.device).exp()[:, None]
    moved, cross, other, mass, pooled = (
        x[..., None, :] for x in (seen.moved, seen.cross, seen.pooled_moved, seen.mass, seen.pooled)
    )
    change = moved - 2 * factor * cross + factor.square() * other
    total = 1 - mass + factor * pooled
    return (change / total.clamp_min(1e-6).square()).sum(-1).mean(0)


def _small_block_factor(mass: torch.Tensor, pooled: torch.Tensor, density: float) -> torch.Tensor:
    """e^c per head, float32 `[H]`, that makes the total right over the blocks a mask of this density would drop; mass
    and pooled `[H, n, k_blocks]` as in BlockCosts."""
    blocks = mass.shape[2]
    count = min(blocks, 1 + round(density * blocks))
    small = mass < mass.topk(count, 2).values[..., -1:]
    true, pooled = (mass * small).sum((1, 2)), (pooled * small).sum((1, 2))
    return (true / pooled.clamp_min(1e-12)).clamp(0.3, 30)


def _levels(error: torch.Tensor) -> torch.Tensor:
    """uint8 like error: how many of the masks that keep the costliest MASK_DENSITIES drop a block."""
    blocks = error.shape[-1]
    ranks = torch.arange(blocks, device=error.device)
    counts = [max(1, round(share * blocks)) for share in MASK_DENSITIES]
    level_of_rank = torch.stack([ranks >= count for count in counts]).sum(0, dtype=torch.uint8)
    best = error.argsort(-1, descending=True)
    return torch.empty_like(error, dtype=torch.uint8).scatter_(-1, best, level_of_rank.expand_as(best))


def observe_tail(
    inputs: AttentionInputs,
    *,
    density: float,
    pool: int,
    expansions: int = MOST_EXPANSIONS,
    rows: int = ROWS_PER_BLOCK,
    curves: bool = True,
    backend: str = "auto",
) -> TailObservation:
    """What each block costs, and which bias suits.

    expansions: of the pools that the biases are for. curves: whether biases are tried. rows: looked at in each query
    block, a power of two up to 64. On a GPU costs three times rows / block_q of a dense attention, and less than half
    of one on top for the biases.
    """
    g, device = inputs.geometry, inputs.q.device
    positions = sampled_rows(g, device, rows)
    size = block_sizes(g, torch.arange(g.q_blocks, device=device))
    sample = _spread(g.q_blocks, device)
    # Many blocks and few rows of each: some blocks tell one factor for all.
    judged = slice(None) if rows >= ROWS_PER_BLOCK else sample
    parts: list[tuple[torch.Tensor | None, ...]] = []
    for some in head_groups(inputs.heads, inputs.group, 32 * g.q_blocks * g.k_blocks):
        part = inputs.of_heads(some)
        costs = block_costs(part, positions, pool=pool, expanded=expansions > 0, backend=backend)
        factor = _small_block_factor(costs.mass[:, judged], costs.pooled[:, judged], density)[:, None, None]
        error = (costs.moved - 2 * factor * costs.cross + factor.square() * costs.pooled_moved).clamp_min_(0)
        found = None
        if curves:
            tail = {"pool": pool, "expansions": expansions, "backend": backend}
            found = _curves(part, error[:, sample], sample, positions, **tail)
        share = size[:, None] / rows
        parts.append((found, error.mul_(share), costs.mass.mul_(share), costs.energy))
    return TailObservation(*(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)))


def bias_curves(
    inputs: AttentionInputs,
    worth: torch.Tensor,
    q_blocks: torch.Tensor,
    *,
    pool: int,
    expansions: int = MOST_EXPANSIONS,
    backend: str = "auto",
) -> torch.Tensor:
    """The curves of `observe_tail` where what masks keep blocks by is known: worth `[Hq, n, k_blocks]` of the query
    blocks q_blocks int64 `[n]`."""
    some = _spread(q_blocks.numel(), inputs.q.device)
    positions = sampled_rows(inputs.geometry, inputs.q.device, CURVE_ROWS)
    tail = {"pool": pool, "expansions": expansions, "backend": backend}
    return _curves(inputs, worth[:, some], q_blocks[some], positions, **tail)


def _spread(blocks: int, device: torch.device) -> torch.Tensor:
    """Numbers of so many things on which biases are tried, int64."""
    return torch.linspace(0, blocks - 1, min(blocks, CURVE_BLOCKS), device=device).round().long()


def _curves(inputs: AttentionInputs, worth: torch.Tensor, q_blocks: torch.Tensor, positions, **tail):
    """Squared error of every bias under masks that keep the blocks of most worth: `TailObservation.curves`. worth
    `[H, n, k_blocks]` of the blocks q_blocks `[n]`, on CURVE_ROWS of the positions `[all q_blocks, rows]` of each."""
    g = inputs.geometry
    every = max(1, positions.shape[1] // CURVE_ROWS)
    rows = positions[q_blocks, every // 2 :: every].flatten()
    levels = torch.zeros(worth.shape[0], g.q_blocks, g.k_blocks, dtype=torch.uint8, device=worth.device)
    levels[:, q_blocks] = _levels(worth)
    return _bias_errors(row_moments(inputs, rows, levels, len(MASK_DENSITIES), **tail))


def observe_bias(
    inputs: AttentionInputs,
    mask: torch.Tensor,
    *,
    pool: int,
    expansions: int = MOST_EXPANSIONS,
    rows: int,
    backend: str = "auto",
) -> BiasObservation:
    """What so many rows tell of the tail's bias under a known mask bool `[Hq, q_blocks, k_blocks]`. Nothing waits for
    the device."""
    g, tables = inputs.geometry, inputs.tables
    positions = spread_positions(g.grid_tokens, rows, inputs.q.device)
    dropped = (~mask).view(torch.uint8)
    seen = row_moments(inputs, positions, dropped, 1, pool=pool, expansions=expansions, backend=backend)
    return BiasObservation(_bias_errors(seen)[:, 0], tables[:, positions].long() + g.prefix, seen.out)


def best_bias(errors: torch.Tensor) -> torch.Tensor:
    """The bias of least error, float32 `[...]` from errors `[..., len(BIASES)]`, refined between the values tried."""
    values = _biases(errors.device)
    at = errors.argmin(-1)
    inner = at.clamp(2, len(BIASES) - 2)
    left, middle, right = (errors.gather(-1, (inner + d)[..., None])[..., 0] for d in (-1, 0, 1))
    bend = (left + right - 2 * middle).clamp_min(1e-20)
    shift = ((left - right) / (2 * bend)).clamp(-0.5, 0.5) * (BIASES[3] - BIASES[2])
    return values[at] + shift.where(at == inner, 0)


def bias_at(curves: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
    """Bias per head for the density its mask came to: curves `[H, len(MASK_DENSITIES), len(BIASES)]`, density `[H]`, or
    `[n, H]` of several masks; float32 like density.

    Between two densities the errors are mixed in proportion to the logarithm of the density.
    """
    points = torch.tensor(MASK_DENSITIES, device=curves.device).log()
    place = density.clamp(MASK_DENSITIES[0], MASK_DENSITIES[-1]).log()
    upper = torch.searchsorted(points, place.contiguous()).clamp(1, len(MASK_DENSITIES) - 1)
    part = ((place - points[upper - 1]) / (points[upper] - points[upper - 1]))[..., None]
    rows = torch.arange(curves.shape[0], device=curves.device)
    return best_bias(curves[rows, upper - 1] * (1 - part) + curves[rows, upper] * part)


# Rows that tell a head's bias: a hundredth of them, within these bounds. What one number goes wrong by depends on how
# many rows were seen, not on their share.
LEAST_ROWS, MOST_ROWS = 64, 192


def measured_rows(tokens: int) -> int:
    """How many rows of so many grid tokens are measured."""
    return min(max(LEAST_ROWS, round(tokens / 100)), MOST_ROWS)
