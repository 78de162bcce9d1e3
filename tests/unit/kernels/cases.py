"""Attention calls at their awkward edges, and an oracle that knows nothing of blocks: a token mask in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.pattern import SparsePattern


@dataclass(frozen=True)
class Case:
    """One call. drift: how far the queries' mean moves along the sequence, another way in each head.

    mask: density, `isolated` (1-0-1), `empty` (a row keeps nothing), `one` (one block in all) or None.
    """

    name: str
    grid: tuple[int, int, int] = (3, 7, 11)
    prefix: int = 0
    suffix: int = 0
    mask: float | str | None = 0.5
    tail: bool = False
    block_q: int = 64
    heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    dim: int = 64
    pool: int = 64
    expansions: int = 16
    orders: str = "random"
    sigma: float = 1.0
    drift: float = 0.0
    bias: bool = False
    strided: bool = False
    dtype: torch.dtype = torch.float16


CASES = [
    Case("ragged grid, random permutations"),
    Case("isolated kept blocks: 1-0-1", grid=(1, 16, 20), mask="isolated"),
    Case("a row that keeps nothing keeps its own block", mask="empty"),
    Case("one block in all: 20 tokens", grid=(1, 4, 5), mask=1.0),
    Case("a single kept block in the whole mask", mask="one", prefix=1),
    Case("whole blocks only, no ragged end", grid=(2, 8, 16), mask=0.6),
    Case("axis orders, dense without a list", mask=None, orders="axes", heads=6, kv_heads=6),
    Case("dense without a list, ragged grid and ragged context", mask=None, prefix=5, suffix=3),
    Case("dense, whole blocks and whole context", mask=None, grid=(2, 8, 8), prefix=64),
    Case("context of one token", suffix=1, tail=True),
    Case("context of one block", prefix=64, tail=True),
    Case("context of a block and a bit, on both sides", prefix=70, suffix=7),
    Case("long text in front", prefix=226, mask=0.3, grid=(1, 7, 11)),
    Case("the tail alone on the grid", mask="empty", tail=True, suffix=2),
    Case("tail with pools of 16", tail=True, pool=16, suffix=3),
    Case("tail with plain means", tail=True, expansions=0, suffix=3),
    Case("tail with a mean query for several query blocks", tail=True, expansions=3, grid=(3, 11, 13), sigma=1.5),
    Case("tail with hidden keys", tail=True, prefix=5, bias=True, batch=2, heads=4, orders="axes"),
    Case("tail with pools of 32 and padded head dimension 72", tail=True, pool=32, dim=72),
    Case("head dimension 96", dim=96, tail=True),
    Case("head dimension 32", dim=32),
    Case("query blocks of 128 rows", block_q=128, grid=(3, 10, 11), tail=True, prefix=9),
    Case("batch of two, grouped queries", batch=2, heads=4, kv_heads=2, tail=True),
    Case("key bias hides padded text", prefix=77, bias=True, batch=2, mask=0.6),
    Case("key bias, dense", prefix=20, bias=True, mask=None),
    Case("views of a fused QKV projection", strided=True, suffix=4, tail=True),
    Case("float32 inputs", dtype=torch.float32, mask=0.6, suffix=2, tail=True),
]
AXES = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))


def geometry(case: Case) -> Geometry:
    return Geometry(case.prefix, case.grid, case.suffix, case.block_q)


def with_mask(pattern: SparsePattern, mask: torch.Tensor) -> SparsePattern:
    """The pattern with another mask `[H, q_blocks, k_blocks]`."""
    made = SparsePattern.from_mask(pattern.geometry, pattern.tables, pattern.order_of_head, mask)
    return replace(pattern, kept_words=made.kept_words)


def make(case: Case, seed: int = 0):
    """q, k, v `[B, H, L, D]` with channel outliers in K, the pattern and the key bias of a case."""
    generator = torch.Generator().manual_seed(seed)
    g = geometry(case)

    def random(heads):
        if case.strided:  # [B, L, 3, H, D], as a fused projection leaves it
            return torch.randn(case.batch, g.length, 3, heads, case.dim, generator=generator)[:, :, 1].transpose(1, 2)
        return torch.randn(case.batch, heads, g.length, case.dim, generator=generator)

    q, k, v = random(case.heads) * case.sigma, random(case.kv_heads) * case.sigma, random(case.kv_heads)
    k = k + 3 * torch.randn(1, case.kv_heads, 1, case.dim, generator=generator)
    if case.orders == "axes":
        index = torch.arange(g.grid_tokens).view(case.grid)
        tables = torch.stack([index.permute(axes).flatten() for axes in AXES])
        order_of_head = torch.arange(case.kv_heads) % len(AXES)
    else:
        tables = torch.stack([torch.randperm(g.grid_tokens, generator=generator) for _ in range(3)])
        order_of_head = torch.randint(0, 3, (case.kv_heads,), generator=generator)
    shape = (case.heads, g.q_blocks, g.k_blocks)
    if case.mask is None:
        mask = None
    elif case.mask == "isolated":
        mask = (torch.arange(g.k_blocks) % 2 == 0).expand(shape).clone()
    elif case.mask == "one":
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[0, -1, -1] = True
    else:
        mask = torch.rand(shape, generator=generator) < (0.5 if case.mask == "empty" else case.mask)
        if case.mask == "empty":
            mask[:, 1] = False
    bias = None
    if case.bias:
        bias = torch.zeros(case.batch, g.length)
        bias[:, case.prefix // 2 : case.prefix] = -torch.inf
        if case.tail:
            bias[:, case.prefix : case.prefix + 70] = -torch.inf
        bias[:, -1] = 0.7
    tail = torch.randn(case.heads, generator=generator) * 0.5 if case.tail else None
    if case.drift:
        way = torch.randn(case.heads, 1, case.dim, generator=generator)
        q = q + case.drift * torch.linspace(-1, 1, g.length)[:, None] * way
    pattern = SparsePattern(g, tables.int(), order_of_head.int(), None, tail, case.pool, case.expansions)
    if mask is not None:
        pattern = with_mask(pattern, mask)
    return q.to(case.dtype), k.to(case.dtype), v.to(case.dtype), pattern, bias


def oracle(q, k, v, pattern: SparsePattern, bias=None) -> torch.Tensor:
    """Exact attention `[B, H, L, D]` in float64, token by token in original order; pools as extra keys."""
    g = pattern.geometry
    q, k, v = q.double(), k.double(), v.double()
    result = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        table = pattern.tables[pattern.order_of_head[h // group]].long()
        place = torch.empty_like(table)  # where each grid token stands in the head's order
        place[table] = torch.arange(table.numel())
        allowed = torch.ones(g.length, g.length, dtype=torch.bool)
        grid = slice(g.prefix, g.prefix + g.grid_tokens)
        if pattern.mask is not None:
            blocks = pattern.mask[h]
            allowed[grid, grid] = blocks[place // g.block_q][:, place // g.block_k]
        for b in range(q.shape[0]):
            scores = q[b, h] @ k[b, h // group].T * q.shape[3] ** -0.5
            if bias is not None:
                scores = scores + bias[b].double()
            scores = scores.masked_fill(~allowed, -torch.inf)
            values = v[b, h // group]
            if pattern.mask is not None and pattern.tail_bias is not None:
                one_bias = None if bias is None else bias[b].double()
                result[b, h] = _with_tail(q[b, h], k[b, h // group], values, scores, allowed, pattern, h, one_bias)
            else:
                result[b, h] = scores.softmax(1) @ values
    return result


def _with_tail(q, k, values, scores, allowed, pattern, h, bias):
    """Attention `[L, D]` of one head with its pools behind the keys, whose scores `[L, L]` are given; bias `[L]`."""
    g, scale, pool = pattern.geometry, q.shape[1] ** -0.5, pattern.pool
    table = pattern.tables[pattern.order_of_head[h // (pattern.tail_bias.numel() // pattern.kv_heads)]].long()
    pools = [table[first : first + pool] + g.prefix for first in range(0, g.grid_tokens, pool)]
    stretches = max(1, min(pattern.expansions, g.q_blocks))
    of_block = [i * stretches // g.q_blocks for i in range(g.q_blocks)]
    tail = torch.full((g.length, len(pools)), -torch.inf, dtype=q.dtype)
    pooled = []
    for s in range(stretches):
        first, last = of_block.index(s), len(of_block) - of_block[::-1].index(s)
        stretch = table[first * g.block_q : last * g.block_q] + g.prefix
        if not pattern.expansions:
            mean = torch.zeros_like(q[0])
        elif len(stretch) <= 128:
            mean = q[stretch].mean(0)
        else:
            mean = q[stretch[(2 * torch.arange(128) + 1) * len(stretch) // 256]].mean(0)
        pooled_v = torch.empty(len(pools), q.shape[1], dtype=q.dtype)
        pooled.append((stretch, pooled_v))
        for i, members in enumerate(pools):
            logits = k[members] @ mean * scale
            if bias is not None:
                logits = logits + bias[members].clamp_min(-1e30)
            weights = logits.softmax(0)
            key, value = weights @ k[members], weights @ values[members]
            tail[stretch, i] = (q[stretch] - mean) @ key * scale + logits.logsumexp(0) + pattern.tail_bias[h].double()
            pooled_v[i] = value
    for i, members in enumerate(pools):
        tail[allowed[:, members[0]], i] = -torch.inf
    weights = torch.cat([scores, tail], 1).softmax(1)
    result = weights[:, : g.length] @ values
    for stretch, pooled_v in pooled:
        result[stretch] += weights[stretch, g.length :] @ pooled_v
    return result


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; infinite if x holds anything that is not finite."""
    if not x.isfinite().all():
        return float("inf")
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()
