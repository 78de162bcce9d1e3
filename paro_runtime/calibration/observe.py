"""From one site's queries and keys to block statistics: which order suits each head, and what its blocks hold.

No pass looks at more rows than it must. To choose, some rows under every candidate order: on small grids the same rows
for all orders, all of them on the smallest; on large ones some rows of some query blocks of each. Then, under the
chosen orders and where the values are at hand, the tail's errors on a few rows of every block, which tell the block
sums too. Without values, or for masks by mass, block sums come from every row of small grids, and from a few mean
queries of every block of large ones; where runs measure their masks themselves, of some blocks, which tell how many
blocks each head wants.
What is looked at shrinks with the size of the grid: up to three dense attentions on the smallest, a third of one on
75,600 tokens (`tests/unit/test_calibration_cost.py`). Nothing waits for the device on large grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...kernels.attention.api import block_statistics, query_sums, row_logsumexp
from ...kernels.core.pattern import MOST_EXPANSIONS, Geometry
from ...kernels.statistics.reference import BlockStatistics, block_positions, block_sizes
from ..plan.orders import ORIGINAL, candidate_orders, order_table, tiled_orders
from ..plan.token_layout import TokenLayout
from .mask_choice import estimated_mass_kept, mass_kept_scores, paper_scores
from .mean_queries import mean_query_masses
from .outlier_rotation import logit_errors
from .tail_fit import TailObservation, bias_curves, observe_tail

# Up to SHARED_TOKENS grid tokens the same rows are looked at under all orders in one go (`sums_under_orders`): all, or
# SHARED_ROWS of them. Samples of 512 rows took orders that cost 1 to 3 dB on the tiny model.
SHARED_TOKENS, SHARED_ROWS = 8192, 4096
# On larger grids, rows of so many query blocks, evenly spread: what a choice can go wrong by depends on how many blocks
# and rows were seen, not on their share.
ORDER_BLOCKS, ORDER_ROWS = 24, 16
# Query blocks for the paper's metric, every row of them. Fewer where there are few, for the cost's sake.
PAPER_BLOCKS, PAPER_BLOCKS_OF_FEW, FEW_BLOCKS = 48, 32, 128
# On large grids: rows of each block for the tail's errors.
LARGE_TAIL_ROWS = 4
# Query blocks, evenly spread, that tell how many blocks a head wants.
BUDGET_BLOCKS = 48
# What an order must be better by, as a share of its score, for a head to leave the one that it was observed under.
LEAST_LEAD = 0.01
# Attention weights of one chunk of rows: what a CPU's cache holds, and half of a large GPU's.
ELEMENTS_IN_CACHE, ELEMENTS_ON_GPU = 1 << 18, 1 << 23


@dataclass(frozen=True)
class StatisticsOptions:
    """How sites are observed.

    density: at which orders are compared. order: `mass`, `paper` or `original`. tiles: offer tiled orders to `mass`.
    pool: tokens per pooled key, None without a tail. expansions: of the pools (`kernels.pools`).
    curves: try biases on sampled rows, for a plan whose first run does not measure them under its masks anyway.
    by_mass: masks will be chosen by mass: block sums of every row or, on large grids, of mean queries, even where the
    tail's sampled rows would tell them; on large grids no errors of single blocks then. sampled: on large grids, block
    sums of some blocks only (`budget_blocks`), since runs measure their masks themselves.
    alpha, sigma: of the paper's metric.
    """

    density: float
    order: str = "mass"
    pool: int | None = 64
    expansions: int = MOST_EXPANSIONS
    tiles: bool = True
    by_mass: bool = False
    alpha: float = 0.5
    sigma: float = 1.0
    curves: bool = True
    sampled: bool = False

    def candidates(self, grid: tuple[int, int, int]) -> tuple[str, ...]:
        """Names of the orders to compare on this grid, FHW first."""
        if self.order == "original":
            return (ORIGINAL,)
        return candidate_orders(grid) + (tiled_orders(grid) if self.tiles and self.order == "mass" else ())


@dataclass(frozen=True)
class Observation:
    """What one attention call told. H = query heads.

    scores  float32 [H, candidates], higher is better; the names are in `candidates`.
    choice  int64 [H]: index of the order under which the rest was taken.
    mass    float32 [H, q_blocks, k_blocks]: attention in each block, of all rows or estimated from the tail's or from
            mean queries; of those of `budget_blocks` only where the options say so.
    tail    errors of the tail, or None without a tail or without values.
    logit_errors float32 [H, 3]: what quantising does to the logits, see `rotation.logit_errors`.
    """

    candidates: tuple[str, ...]
    scores: torch.Tensor
    choice: torch.Tensor
    mass: torch.Tensor
    tail: TailObservation | None = None
    logit_errors: torch.Tensor | None = None


def geometry_of(layout: TokenLayout, block_q: int) -> Geometry:
    """The kernels' view of a layout."""
    return Geometry(layout.prefix, layout.grid, layout.suffix, block_q)


@lru_cache(maxsize=32)
def _table_on(name: str, grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """The order's table on a device: every site of a run asks for the same ten."""
    return order_table(name, grid).to(device)


@lru_cache(maxsize=4)
def _tables_on(names: tuple[str, ...], grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """int32 `[orders, N]`."""
    return torch.stack([_table_on(name, grid, device) for name in names])


def order_sample(q_blocks: int, count: int, device: torch.device) -> torch.Tensor:
    """So many evenly spread query blocks, or as many as there are: int64, rising."""
    # Brought to the device rather than made there: what is unique would be waited for.
    return torch.linspace(0, q_blocks - 1, min(q_blocks, count)).round().long().unique().to(device)


def observe(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: TokenLayout,
    block_q: int,
    options: StatisticsOptions,
    *,
    v: torch.Tensor | None = None,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    previous_scores: torch.Tensor | None = None,
    previous_choice: torch.Tensor | None = None,
    backend: str = "auto",
) -> Observation:
    """Statistics of one call; q `[B, Hq, L, D]`, k and v `[B, Hkv, L, D]`, key_bias `[B, L]`.

    previous_scores `[Hq, candidates]` of earlier calls are added before choosing, so that the choice rests on all. A
    head leaves its previous_choice `[Hq]` only for an order that is better by LEAST_LEAD: what was summed under the old
    one is lost with it.
    The query heads that share a key head share its order, since the keys are reordered once.
    """
    geometry = geometry_of(layout, block_q)
    candidates = options.candidates(layout.grid)
    heads, kv_heads = q.shape[1], k.shape[1]
    rest = {"scale": scale, "backend": backend}
    scores, masses = order_scores(q, k, geometry, options, key_bias=key_bias, **rest)
    total = scores if previous_scores is None else scores + previous_scores.to(scores.device)
    per_group = total.unflatten(0, (kv_heads, heads // kv_heads)).mean(1)
    choice = first_best(per_group)
    if previous_choice is not None:
        present = previous_choice.to(choice.device).unflatten(0, (kv_heads, -1))[:, 0]
        its, best = per_group.gather(1, present[:, None])[:, 0], per_group.amax(1)
        choice = choice.where(best - its > LEAST_LEAD * best.abs(), present)
    choice = choice.repeat_interleave(heads // kv_heads)
    rows = _tables_on(candidates, layout.grid, q.device)[choice]
    large = layout.grid_tokens > SHARED_TOKENS
    rest["key_bias"] = key_bias
    mass = tail = None
    if masses is not None:
        mass = torch.stack([masses[order][head] for head, order in enumerate(choice.tolist())])
    elif large and (options.by_mass or v is None or options.pool is None):
        seen = budget_blocks(geometry, q.device) if options.sampled else None
        mass = mean_query_masses(q, k, geometry, rows, q_blocks=seen, **rest)
    if v is not None and options.pool is not None:
        pools = {"pool": options.pool, "expansions": options.expansions}
        if large and options.by_mass and mass is not None:
            if options.curves:
                seen = torch.arange(geometry.q_blocks, device=q.device) if seen is None else seen
                tail = TailObservation(curves=bias_curves(q, k, v, geometry, rows, mass, seen, **pools, **rest))
        else:
            sizes = {"curves": options.curves} | ({"rows": LARGE_TAIL_ROWS} if large else {})
            tail = observe_tail(q, k, v, geometry, rows, density=options.density, **sizes, **pools, **rest)
    if mass is None and tail is not None and not options.by_mass:
        mass = tail.mass
    if mass is None:
        lse = row_logsumexp(q, k, **rest)
        del rest["key_bias"]
        mass = block_statistics(q, k, lse, geometry, rows, **rest).mass
    errors = logit_errors(q, k, geometry, rows, scale=scale)
    return Observation(candidates, scores, choice, mass, tail, errors)


@lru_cache(maxsize=8)
def budget_blocks(g: Geometry, device: torch.device) -> torch.Tensor:
    """The query blocks that tell how many blocks a head wants: int64, rising, all of them whole."""
    whole = g.grid_tokens // g.block_q
    return torch.linspace(0, whole - 1, min(whole, BUDGET_BLOCKS)).round().long().to(device)


def order_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    g: Geometry,
    options: StatisticsOptions,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """How well each candidate order suits each head, float32 `[Hq, candidates]`, higher is better; and the block sums
    of every row under each of them, `[Hq, q_blocks, k_blocks]`, where comparing orders took those, or None."""
    names, heads = options.candidates(g.grid), q.shape[1]
    rest = {"scale": scale, "backend": backend}
    if options.order != "paper" and g.grid_tokens <= SHARED_ROWS:
        masses = sums_under_orders(q, k, g, names, scale=scale, key_bias=key_bias)
        return mass_kept_scores([BlockStatistics(mass) for mass in masses], options.density), masses
    if len(names) == 1:
        return torch.zeros(heads, 1, device=q.device), None
    if options.order == "paper":
        count = PAPER_BLOCKS_OF_FEW if g.q_blocks <= FEW_BLOCKS else PAPER_BLOCKS
        looks = {"q_blocks": order_sample(g.q_blocks, count, q.device), "epsilon": 1 / g.grid_tokens, **rest}
        lse = row_logsumexp(q, k, key_bias=key_bias, **rest)
        tables = _tables_on(names, g.grid, q.device)
        seen = [block_statistics(q, k, lse, g, table.expand(heads, -1), **looks) for table in tables]
        return paper_scores(seen, options.alpha, options.sigma), None
    if g.grid_tokens <= SHARED_TOKENS:
        sums = sums_under_orders(q, k, g, names, scale=scale, key_bias=key_bias)
        return mass_kept_scores([BlockStatistics(mass) for mass in sums], options.density), None
    sums = sampled_sums(q, k, g, names, ORDER_BLOCKS, ORDER_ROWS, key_bias=key_bias, **rest)
    return estimated_mass_kept(sums, options.density).T, None


def sampled_sums(
    q, k, g: Geometry, names: tuple[str, ...], blocks: int, rows: int, *, scale=None, key_bias=None, backend="auto"
) -> torch.Tensor:
    """Block sums under every order, estimated from rows of some query blocks: `[orders, Hq, blocks, k_blocks]`."""
    tokens, share = _sampled_tokens(g, names, blocks, rows, q.device)
    tables = _tables_on(names, g.grid, q.device)[:, None].expand(-1, q.shape[1], -1)
    rest = {"scale": scale, "key_bias": key_bias, "backend": backend}
    return query_sums(q[:, :, tokens], k, g, tables, rows, **rest).mul_(share)


@lru_cache(maxsize=4)
def _sampled_tokens(
    g: Geometry, names: tuple[str, ...], blocks: int, rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that `sampled_sums` looks at, order by order, int64; what each stands for, float32 `[n, 1]`."""
    sample = order_sample(g.q_blocks, blocks, torch.device("cpu"))
    positions = block_positions(g, sample, rows)[0].flatten()
    tokens = torch.cat([order_table(name, g.grid)[positions] for name in names]).long() + g.prefix
    return tokens.to(device), (block_sizes(g, sample)[:, None] / rows).to(device)


@dataclass(frozen=True)
class _Bags:
    """What is added to what, for some orders of a grid; on one device.

    tokens int64 `[n]`: rows that are looked at. keys int64 `[orders * N]`, key_starts `[orders * k_blocks]`: the grid
    tokens of each block of keys of each order, and where each block begins. rows: per order the same for query blocks
    (numbers within `tokens`, begins), and tokens in a block per token that is looked at, float32 `[q_blocks, 1]`.
    """

    tokens: torch.Tensor
    keys: torch.Tensor
    key_starts: torch.Tensor
    rows: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]


@lru_cache(maxsize=4)
def _bags(g: Geometry, names: tuple[str, ...], rows: int, device: torch.device) -> _Bags:
    """Every site of a run asks for the same."""
    tokens = torch.arange(g.grid_tokens, device=device)
    if rows < g.grid_tokens:
        # At random: a regular stride would see every other column of some grids, and some blocks of some orders never.
        tokens = torch.randperm(g.grid_tokens, generator=torch.Generator().manual_seed(0))[:rows].sort().values
        tokens = tokens.to(device)
    tables = [_table_on(name, g.grid, device).long() for name in names]
    blocks = torch.arange(g.q_blocks, device=device)
    of_orders = []
    for table in tables:
        # The inverse of a permutation: where each grid token stands in the order.
        place, members = table.argsort()[tokens].sort()
        first = torch.searchsorted(place, blocks * g.block_q)
        seen = torch.cat([first[1:], first.new_full((1,), tokens.numel())]) - first
        of_orders.append((members, first, (block_sizes(g, blocks) / seen.clamp_min(1))[:, None]))
    starts = torch.arange(len(tables), device=device)[:, None] * g.grid_tokens
    starts = starts + torch.arange(g.k_blocks, device=device) * g.block_k
    return _Bags(tokens, torch.cat(tables), starts.flatten(), tuple(of_orders))


@torch.no_grad()
def sums_under_orders(
    q: torch.Tensor,
    k: torch.Tensor,
    g: Geometry,
    names: tuple[str, ...],
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    rows: int = SHARED_ROWS,
) -> list[torch.Tensor]:
    """Block sums under every order from one product Q K^T: float32 `[Hq, q_blocks, k_blocks]` per order.

    Arguments as in `kernels.api.block_statistics`; names: of the orders; rows: at most so many query rows are looked
    at, and the sums of all estimated from them. Weights lie key by row, so that adding up the keys of a block adds
    whole vectors: `embedding_bag` fetches and adds them in one go, so orders cost additions but no multiplications.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    batch, heads = q.shape[:2]
    bags = _bags(g, names, min(rows, g.grid_tokens), q.device)
    sums = [torch.zeros(heads, g.q_blocks, g.k_blocks, device=q.device) for _ in names]
    step = max(16, (ELEMENTS_ON_GPU if q.is_cuda else ELEMENTS_IN_CACHE) // g.length // 16 * 16)
    # One buffer for all chunks: fresh memory costs a CPU more than what is done in it.
    buffer = torch.empty(g.length * min(step, bags.tokens.numel()), device=q.device)
    grid = slice(g.prefix, g.prefix + g.grid_tokens)
    for b in range(batch):
        for h in range(heads):
            queries = q[b, h, bags.tokens + g.prefix].float() * scale
            keys = k[b, h // (heads // k.shape[1])].float()
            by_chunk = []
            for some in queries.split(step):
                weights = buffer[: g.length * some.shape[0]].view(g.length, -1)
                torch.mm(keys, some.T, out=weights)
                if key_bias is not None:
                    weights += key_bias[b].float()[:, None]
                weights.sub_(weights.amax(0)).exp_()
                by_key = _bag_sums(bags.keys, weights[grid], bags.key_starts)
                # All keys of a row: those of the grid are added up already.
                total = by_key[: g.k_blocks].sum(0) + weights[: grid.start].sum(0) + weights[grid.stop :].sum(0)
                by_chunk.append(by_key.div_(total))
            per_order = torch.cat(by_chunk, 1).T.contiguous().split(g.k_blocks, 1)
            for found, (members, first, share), part in zip(sums, bags.rows, per_order, strict=True):
                found[h] += _bag_sums(members, part.contiguous(), first) * (share / batch)
    return sums


def _bag_sums(index: torch.Tensor, values: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Sums of values `[n, m]` over the rows `index [starts[i] : starts[i + 1]]`: `[len(starts), m]`."""
    return torch.nn.functional.embedding_bag(index, values, starts, mode="sum")


def first_best(scores: torch.Tensor, tie: float = 1e-4) -> torch.Tensor:
    """Index of the first score within `tie` of the best, per row of `[H, n]`: the original order wins ties."""
    return (scores >= scores.amax(1, keepdim=True) - tie).float().argmax(1)
