"""Which blocks of keys each block of queries attends to, told by a few mean queries of each."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from ..core.dispatch import uses_reference
from ..core.gather import block_sizes, take_rows
from ..core.inputs import ScoreInputs
from ..core.layout import Geometry, padded_dim
from ..core.sampling import head_groups, of_key_heads, sampled_rows
from .api import query_sums

# Parts of a query block whose mean queries tell what it looks at: on grids of up to so many tokens, where a block is
# wide compared with the picture and little work, and on larger ones.
FEW_TOKENS, FINE_MEANS, MEANS_PER_BLOCK = 8192, 16, 4


def means_per_block(geometry: Geometry) -> int:
    """Mean queries of each query block: on the tiny model sixteen are worth 1.8 dB more than four (docs/method.md)."""
    return FINE_MEANS if geometry.grid_tokens <= FEW_TOKENS else MEANS_PER_BLOCK


def mean_query_masses(
    scores: ScoreInputs,
    geometry: Geometry,
    tables: torch.Tensor,
    *,
    q_blocks: torch.Tensor | None = None,
    parts: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of the mean queries of each query block, `parts` of them (None: `means_per_block`), in each block of
    keys: float32 `[Hq, q_blocks, k_blocks]`, mean over the batch.

    tables int `[Hq, N]`: grid index at each position of the head's order. q_blocks int64 `[n]`: only of these query
    blocks, which must be whole. A few mean queries of a block tell what it attends to; more single rows would be
    needed. Costs half of their number / block_q of a dense attention.
    """
    g, q, parts = geometry, scores.q, parts or means_per_block(geometry)
    found = []
    for some in head_groups(scores.heads, scores.group, 2 * scores.batch * g.length * scores.dim * q.element_size()):
        keys, its = scores.k[:, of_key_heads(some, scores.group)], tables[some]
        if q_blocks is None:
            queries = mean_queries_of_blocks(q[:, some], g, its, parts, backend)
        else:
            wanted = its.unfold(1, g.block_q, g.block_q)[:, q_blocks].flatten(1)
            queries = _of_whole_blocks(q[:, some], g, wanted, g.block_q // parts, backend)
        found.append(query_sums(replace(scores, q=queries, k=keys), g, its[None], parts, backend)[0])
    sizes = block_sizes(g, torch.arange(g.q_blocks, device=q.device) if q_blocks is None else q_blocks)
    return torch.cat(found) * (sizes[:, None] / parts)


def mean_queries_of_blocks(
    q: torch.Tensor, geometry: Geometry, tables: torch.Tensor, parts: int, backend: str = "auto"
) -> torch.Tensor:
    """Mean queries of the parts of each query block, which follow each other in the head's order: `[B, H,
    q_blocks * parts, D]` in q's type; q `[B, H, L, D]`, tables int `[H, N]`. Of a last block of fewer rows than parts,
    rows of it."""
    g = geometry
    whole = g.grid_tokens // g.block_q * g.block_q
    rest = g.grid_tokens - whole
    means = []
    if whole:
        means.append(_of_whole_blocks(q, g, tables[:, :whole], g.block_q // parts, backend))
    if rest >= parts:
        last = take_rows(q, tables[:, whole:].long() + g.prefix)
        ends = [part * rest // parts for part in range(parts + 1)]
        means += [last[:, :, a:b].mean(2, keepdim=True, dtype=torch.float32).to(q.dtype) for a, b in pairwise(ends)]
    elif rest:
        means.append(take_rows(q, tables[:, sampled_rows(g, q.device, parts)[-1]].long() + g.prefix))
    return torch.cat(means, 2)


def _of_whole_blocks(q, g: Geometry, tokens: torch.Tensor, size: int, backend: str) -> torch.Tensor:
    """Means of every `size` grid tokens of int `[H, n * size]`, one after the other, `[B, H, n, D]`."""
    if uses_reference(backend, q):
        return take_rows(q, tokens.long() + g.prefix).unflatten(2, (-1, size)).mean(3, dtype=torch.float32).to(q.dtype)
    from ..pooling.triton_pools import launch_mean_queries

    batch, heads, _, dim = q.shape
    count = tokens.shape[1] // size
    means = torch.empty(batch * heads, count, padded_dim(dim), dtype=q.dtype, device=q.device)
    # The parts are to the kernel what stretches of query blocks are elsewhere: as many, of a block each.
    launch_mean_queries(q, replace(g, grid=(1, 1, tokens.shape[1]), block_q=size), tokens, None, means)
    return means.view(batch, heads, count, -1)[..., :dim]
