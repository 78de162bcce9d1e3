"""Every kernel call of a run, once, in small: what must be compiled before a run can go sparse.

Used by a process that compiles only (`kernels.compile_only`): nothing is computed, the results are whatever memory
held. What is called is what `evaluation` calls, with sizes in the same classes, so that the same kernels are compiled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch

from ..kernels import gluon_launch
from ..kernels.api import add_corrections, block_statistics, query_corrections, row_logsumexp
from ..kernels.call import KEY_SAMPLE_FROM
from ..kernels.problem import MOST_EXPANSIONS, PRECISIONS, SparsePattern
from . import statistics
from .attention import dense_pattern, run_kernel
from .correction import rows_per_mean_query
from .orders import AXIS_ORDERS
from .recipes import COMPARED_DENSITY, query_block
from .second_look import mean_query_masses
from .statistics import SHARED_TOKENS, StatisticsOptions, geometry_of, order_scores
from .tail import observe_bias, observe_tail
from .tokens import TokenLayout

# Grids that stand for all larger ones, of a video and of an image.
LARGE = ((5, 58, 58), (1, 130, 130))


@dataclass(frozen=True)
class Job:
    """What decides which kernels a run needs.

    capability: of the GPU. dtype: of q, k, v, such as `bfloat16`. group: query heads per key head. biased: with a bias
    per key. precision: a name of `PRECISIONS`. pool: tokens per pooled key, None without a tail.
    """

    capability: tuple[int, int]
    dtype: str
    head_dim: int
    group: int
    batch: int
    prefix: int
    grid: tuple[int, int, int]
    suffix: int
    biased: bool
    precision: str
    order: str
    pool: int | None

    def small(self) -> Job:
        """The job that stands for all of this one's kind: equal ones need the same kernels."""
        tokens = TokenLayout(0, self.grid).grid_tokens
        grid = self.grid
        if tokens + self.prefix + self.suffix >= KEY_SAMPLE_FROM:
            grid = LARGE[self.grid[0] == 1]
        context = (min(1, self.prefix) * 5, min(1, self.suffix) * 3)
        return Job(**{**asdict(self), "grid": grid, "prefix": context[0], "suffix": context[1]})

    @classmethod
    def from_dict(cls, values: dict) -> Job:
        """Inverse of `dataclasses.asdict`, also after JSON."""
        names = {f.name for f in fields(cls)}
        tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**{name: value for name, value in tuples.items() if name in names})


def rehearse(job: Job, heads: int = 2) -> None:
    """Call everything once; heads: of keys. Only the launches count, so what has none is left out."""
    layout = TokenLayout(job.prefix, job.grid, job.suffix)
    q_heads, dtype = heads * job.group, getattr(torch, job.dtype)
    q, k, v = (
        torch.zeros(job.batch, layout.length, n, job.head_dim, dtype=dtype).transpose(1, 2)
        for n in (q_heads, heads, heads)
    )
    bias = torch.zeros(job.batch, layout.length) if job.biased else None
    precision, rest = PRECISIONS[job.precision], {"key_bias": bias, "backend": "triton"}
    flag = torch.zeros(4, dtype=torch.int32)
    run_kernel(q, k, v, dense_pattern(layout, q_heads, heads, q.device), precision, nonfinite=flag, **rest)

    block_q = query_block(layout.grid_tokens)
    g = geometry_of(layout, block_q)
    tables = torch.stack([statistics._table_on(AXIS_ORDERS[0], job.grid, q.device)])
    of_heads = tables.expand(q_heads, -1)
    mask = torch.ones(q_heads, g.q_blocks, g.k_blocks, dtype=torch.bool)
    tail = None if job.pool is None else torch.zeros(q_heads)
    expansions = 0 if job.pool is None else MOST_EXPANSIONS
    pattern = SparsePattern.from_mask(
        g, tables, torch.zeros(heads, dtype=torch.int32), mask, tail, job.pool or g.block_k, expansions
    )
    for gluon in (True, False):
        gluon_launch.forbid(None if gluon else "the general kernel too")
        run_kernel(q, k, v, pattern, precision, nonfinite=flag, **rest)
    looks = {"key_bias": bias, "backend": "triton"}
    order_scores(q, k, g, StatisticsOptions(COMPARED_DENSITY, job.order, job.pool), **looks)
    if tail is None or g.grid_tokens <= SHARED_TOKENS:
        lse = row_logsumexp(q, k, **looks)
        block_statistics(q, k, lse, g, of_heads, backend="triton")
    if tail is None:
        return
    observe_tail(q, k, v, g, of_heads, density=COMPARED_DENSITY, pool=job.pool, expansions=expansions, **looks)
    rows = rows_per_mean_query(g)
    out = torch.empty_like(q)
    observe_bias(q, k, v, g, of_heads, mask, pool=job.pool, expansions=expansions, share=0.01, **rest)
    mean_query_masses(q, k, g, of_heads, **rest)
    for some in (torch.arange(q_heads, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)):
        made = query_corrections(q, k, v, pattern, some, rows=rows, **rest)
        shares = torch.ones(q_heads)
        add_corrections(out, made.to(dtype), shares, pattern, some, rows=rows, nonfinite=flag, backend="triton")
