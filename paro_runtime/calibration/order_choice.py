"""Which order suits each head: rows of a site under every candidate order, and how much each order keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from ...kernels.core.gather import block_positions, block_sizes
from ...kernels.core.inputs import ScoreInputs
from ...kernels.core.layout import Geometry
from ...kernels.statistics.api import block_statistics, query_sums, row_logsumexp
from ...kernels.statistics.order_sums import OrderBags, block_sums_under_orders, order_bags
from ...kernels.statistics.reference import BlockStatistics
from ..plan.orders import order_table, table_on, tables_on
from .mask_choice import RANKED_VALUES, sample_stride
from .options import StatisticsOptions, is_large

# Grids of up to so many tokens show every row under all orders in one go (`sums_under_orders`), others that are not
# large so many random ones. Samples of 512 rows took orders that cost 1 to 3 dB on the tiny model.
SHARED_ROWS = 4096
# On larger grids, rows of so many query blocks, evenly spread: what a choice can go wrong by depends on how many blocks
# and rows were seen, not on their share.
ORDER_BLOCKS, ORDER_ROWS = 24, 16
# Query blocks for the paper's metric, every row of them. Fewer where there are few, for the cost's sake.
PAPER_BLOCKS, PAPER_BLOCKS_OF_FEW, FEW_BLOCKS = 48, 32, 128
# What an order must be better by, as a share of its score, for a head to leave the one that it was observed under.
LEAST_LEAD = 0.01
# Scores that differ by no more are as good as each other.
TIE = 1e-4


def order_sample(q_blocks: int, count: int, device: torch.device) -> torch.Tensor:
    """So many evenly spread query blocks, or as many as there are: int64, rising."""
    # Brought to the device rather than made there: what is unique would be waited for.
    return torch.linspace(0, q_blocks - 1, min(q_blocks, count)).round().long().unique().to(device)


def order_scores(
    scores: ScoreInputs, g: Geometry, options: StatisticsOptions, backend: str = "auto"
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """How well each candidate order suits each head, float32 `[Hq, candidates]`, higher is better; and the block sums
    of every row under each of them, `[Hq, q_blocks, k_blocks]`, where comparing orders took those, or None."""
    names, device = options.candidates(g.grid), scores.q.device
    every_row = options.order != "paper" and g.grid_tokens <= SHARED_ROWS
    if len(names) == 1 and not every_row:
        return torch.zeros(scores.heads, 1, device=device), None
    if options.order == "paper":
        count = PAPER_BLOCKS_OF_FEW if g.q_blocks <= FEW_BLOCKS else PAPER_BLOCKS
        lse = row_logsumexp(scores, backend)
        look = partial(block_statistics, q_blocks=order_sample(g.q_blocks, count, device), backend=backend)
        of_heads = (table.expand(scores.heads, -1) for table in tables_on(names, g.grid, device))
        seen = [look(scores, lse, g, tables, epsilon=1 / g.grid_tokens) for tables in of_heads]
        return paper_scores(seen), None
    if is_large(g.grid_tokens) and not every_row:
        sums = sampled_sums(scores, g, names, ORDER_BLOCKS, ORDER_ROWS, backend)
        return estimated_mass_kept(sums, options.density).T, None
    masses = sums_under_orders(scores, g, names)
    return mass_kept_scores(masses, options.density), masses if every_row else None


@lru_cache(maxsize=4)
def _bags(g: Geometry, names: tuple[str, ...], rows: int, device: torch.device) -> OrderBags:
    """Every site of a run asks for the same."""
    return order_bags(g, [table_on(name, g.grid, device) for name in names], rows)


def sums_under_orders(
    scores: ScoreInputs, g: Geometry, names: tuple[str, ...], rows: int = SHARED_ROWS
) -> list[torch.Tensor]:
    """Block sums under every named order, float32 `[Hq, q_blocks, k_blocks]` each, from at most so many rows."""
    return block_sums_under_orders(scores, g, _bags(g, names, min(rows, g.grid_tokens), scores.q.device))


def sampled_sums(
    scores: ScoreInputs, g: Geometry, names: tuple[str, ...], blocks: int, rows: int, backend: str = "auto"
) -> torch.Tensor:
    """Block sums under every order, estimated from rows of some query blocks: `[orders, Hq, blocks, k_blocks]`."""
    q = scores.q
    tokens, share = _sampled_tokens(g, names, blocks, rows, q.device)
    tables = tables_on(names, g.grid, q.device)[:, None].expand(-1, scores.heads, -1)
    return query_sums(replace(scores, q=q[:, :, tokens]), g, tables, rows, backend).mul_(share)


@lru_cache(maxsize=4)
def _sampled_tokens(
    g: Geometry, names: tuple[str, ...], blocks: int, rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that `sampled_sums` looks at, order by order, int64; what each stands for, float32 `[n, 1]`."""
    sample = order_sample(g.q_blocks, blocks, torch.device("cpu"))
    positions = block_positions(g, sample, rows)[0].flatten()
    tokens = torch.cat([order_table(name, g.grid)[positions] for name in names]).long() + g.prefix
    return tokens.to(device), (block_sizes(g, sample)[:, None] / rows).to(device)


def first_best(scores: torch.Tensor) -> torch.Tensor:
    """Index of the first score within TIE of the best, per row of `[H, n]`: the original order wins ties."""
    return (scores >= scores.amax(1, keepdim=True) - TIE).float().argmax(1)


def mass_kept_scores(masses: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    """Share of attention that the best `density` of the blocks hold, per head and candidate: float32 `[H, n]`, of
    block sums `[H, q_blocks, k_blocks]` under each candidate."""
    columns = []
    for mass in masses:
        flat = mass.flatten(1)
        count = max(1, round(density * flat.shape[1]))
        columns.append(flat.topk(count, 1).values.sum(1) / flat.sum(1).clamp_min(1e-20))
    return torch.stack(columns, 1)


def estimated_mass_kept(sums: torch.Tensor, density: float) -> torch.Tensor:
    """The same for sums `[..., n, k_blocks]`, float32 `[...]`, without ranking them all: where the threshold lies is
    estimated, and blocks that are worth as much as it make up for what that is off."""
    flat = sums.flatten(-2)
    count = max(1, round(density * flat.shape[-1]))
    some = flat[..., :: sample_stride(flat.shape[-1] / RANKED_VALUES, sums.shape[-1])]
    rank = min(max(1, round(density * some.shape[-1])), some.shape[-1])
    threshold = some.sort(-1, descending=True).values[..., rank - 1, None]
    above = flat >= threshold
    missing = count - above.sum(-1)
    return (flat.mul(above).sum(-1) + missing * threshold[..., 0]) / flat.sum(-1).clamp_min(1e-20)


def paper_scores(seen: Sequence[BlockStatistics]) -> torch.Tensor:
    """The paper's metric (arXiv 2506.16054, figure 3) with its sign corrected, negated: higher is better, `[H, n]`.

    M = a (1 - M_sparse) / sum(1 - M_sparse) + (1 - a) M_quant / sum(M_quant), where M_sparse is the share of blocks in
    which at least sigma of the weights are tiny, M_quant the mean of max/mean over blocks, and a one half. As printed
    the paper adds M_sparse, for which higher is better, and then takes the minimum.

    Its example sigma of 0.9 prefers the wrong orders on our bench: a stride-64 diagonal leaves 63 of 64 weights of
    every block tiny, so 90 % tiny is no sign of an empty block. Counted are blocks whose weights are all tiny.
    """
    of_dense, of_peaks = [], []
    for s in seen:
        nearly_empty = (s.small >= 1 - 1e-6).float().mean((1, 2))
        of_dense.append(1 - nearly_empty)
        cell = s.mass / s.mass.sum((1, 2), keepdim=True).clamp_min(1e-20)
        peak = s.maximum / s.mass.sum((1, 2), keepdim=True).clamp_min(1e-20)
        # An all-zero block has no incoherence; the guard keeps 0/0 out of the mean.
        of_peaks.append((peak / cell.clamp_min(1e-12)).where(cell > 0, 0).mean((1, 2)))
    dense, incoherence = torch.stack(of_dense, 1), torch.stack(of_peaks, 1)
    metric = 0.5 * dense / dense.sum(1, keepdim=True).clamp_min(1e-12)
    metric = metric + 0.5 * incoherence / incoherence.sum(1, keepdim=True).clamp_min(1e-12)
    return -metric
