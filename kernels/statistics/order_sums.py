"""Attention mass of every block under several orders at once, from one product of queries and keys.

For grids whose rows can all be looked at, or a random share of them, whatever the order: plain PyTorch, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.gather import block_sizes
from ..core.inputs import ScoreInputs
from ..core.layout import Geometry

# Attention weights of one chunk of rows: what a CPU's cache holds, and half of a large GPU's.
ELEMENTS_IN_CACHE, ELEMENTS_ON_GPU = 1 << 18, 1 << 23


@dataclass(frozen=True)
class OrderBags:
    """What is added to what, for some orders of a grid; on one device.

    tokens int64 `[n]`: rows that are looked at. keys int64 `[orders * N]`, key_starts `[orders * k_blocks]`: the grid
    tokens of each block of keys of each order, and where each block begins. rows: per order the same for query blocks
    (numbers within `tokens`, begins), and tokens in a block per token that is looked at, float32 `[q_blocks, 1]`.
    """

    tokens: torch.Tensor
    keys: torch.Tensor
    key_starts: torch.Tensor
    rows: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]


def order_bags(g: Geometry, tables: Sequence[torch.Tensor], rows: int) -> OrderBags:
    """Of orders with these tables, int `[N]` each; at most so many query rows are looked at."""
    device = tables[0].device
    tokens = torch.arange(g.grid_tokens, device=device)
    if rows < g.grid_tokens:
        # At random: a regular stride would see every other column of some grids, and some blocks of some orders never.
        tokens = torch.randperm(g.grid_tokens, generator=torch.Generator().manual_seed(0))[:rows].sort().values
        tokens = tokens.to(device)
    tables = [table.long() for table in tables]
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
    return OrderBags(tokens, torch.cat(tables), starts.flatten(), tuple(of_orders))


@torch.no_grad()
def block_sums_under_orders(scores: ScoreInputs, g: Geometry, bags: OrderBags) -> list[torch.Tensor]:
    """Block sums under every order from one product Q K^T: float32 `[Hq, q_blocks, k_blocks]` per order.

    The sums are estimated from the rows in the bags. Weights lie key by row, so that adding up the keys of a block adds
    whole vectors: `embedding_bag` fetches and adds them in one go, so orders cost additions but no multiplications.
    """
    q, k, key_bias, scale, heads = scores.q, scores.k, scores.key_bias, scores.score_scale, scores.heads
    sums = [torch.zeros(heads, g.q_blocks, g.k_blocks, device=q.device) for _ in bags.rows]
    step = max(16, (ELEMENTS_ON_GPU if q.is_cuda else ELEMENTS_IN_CACHE) // g.length // 16 * 16)
    # One buffer for all chunks: fresh memory costs a CPU more than what is done in it.
    buffer = torch.empty(g.length * min(step, bags.tokens.numel()), device=q.device)
    grid = slice(g.prefix, g.prefix + g.grid_tokens)
    for b in range(scores.batch):
        for h in range(heads):
            queries = q[b, h, bags.tokens + g.prefix].float() * scale
            keys = k[b, h // scores.group].float()
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
                found[h] += _bag_sums(members, part.contiguous(), first) * (share / scores.batch)
    return sums


def _bag_sums(index: torch.Tensor, values: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Sums of values `[n, m]` over the rows `index [starts[i] : starts[i + 1]]`: `[len(starts), m]`."""
    return torch.nn.functional.embedding_bag(index, values, starts, mode="sum")
