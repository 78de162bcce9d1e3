"""Every kernel call of a run, once, in small: what must be compiled before a run can go sparse.

Used by a process that compiles only (`kernels.compile_only`): nothing is computed, the results are whatever memory
held. What is called is what `evaluation` calls, with sizes in the same classes, so that the same kernels are compiled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch

from ...kernels.attention.api import sparse_attention as run_kernel
from ...kernels.attention.gluon_sm90 import launch as gluon_launch
from ...kernels.core.compile_only import Launches
from ...kernels.core.inputs import ScoreInputs
from ...kernels.core.layout import TokenLayout, geometry_of
from ...kernels.core.pattern import MOST_EXPANSIONS, SparsePattern
from ...kernels.core.precision import PRECISIONS
from ...kernels.statistics.mean_queries import mean_query_masses
from ..attention.dense import dense_pattern
from ..calibration.observe import observe
from ..calibration.options import StatisticsOptions, is_large
from ..calibration.tail_fit import LEAST_ROWS, observe_bias
from ..plan.options import COMPARED_DENSITY, query_block
from ..plan.orders import AXIS_ORDERS, table_on
from .self_check import errors_of

# Grids of more tokens are all alike to every kernel; those that stand for them, of a video and of an image.
LARGEST_ITSELF = 16384
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
        if tokens > LARGEST_ITSELF:
            grid = LARGE[self.grid[0] == 1]
        # What stands beside the grid asks for no other kernels, and two in a batch for all that one does.
        return Job(**{**asdict(self), "grid": grid, "batch": 2, "prefix": 0, "suffix": 0})

    @classmethod
    def from_dict(cls, values: dict) -> Job:
        """Inverse of `dataclasses.asdict`, also after JSON."""
        return cls(**values | {name: tuple(value) for name, value in values.items() if isinstance(value, list)})


def rehearse(job: Job, launches: Launches | None = None) -> None:
    """Call everything once. Only the launches count, so what has none is left out. launches: what can be done without
    at first is marked as late in it."""
    launches, heads = launches or Launches(), 2  # of keys
    layout = TokenLayout(job.prefix, job.grid, job.suffix)
    q_heads, dtype = heads * job.group, getattr(torch, job.dtype)
    q, k, v = (
        torch.zeros(job.batch, layout.length, n, job.head_dim, dtype=dtype).transpose(1, 2)
        for n in (q_heads, heads, heads)
    )
    bias = torch.zeros(job.batch, layout.length) if job.biased else None
    precision, flag = PRECISIONS[job.precision], torch.zeros(4, dtype=torch.int32)
    run = partial(run_kernel, q, k, v, key_bias=bias, nonfinite=flag, backend="triton")
    dense = dense_pattern(layout, q_heads, heads, q.device)
    with gluon_launch.set_aside():
        run(dense, precision)

    block_q = query_block(layout.grid_tokens)
    g = geometry_of(layout, block_q)
    tables = torch.stack([table_on(AXIS_ORDERS[0], job.grid, q.device)])
    of_heads = tables.expand(q_heads, -1)
    mask = torch.ones(q_heads, g.q_blocks, g.k_blocks, dtype=torch.bool)
    tail = None if job.pool is None else torch.zeros(q_heads)
    expansions = 0 if job.pool is None else MOST_EXPANSIONS
    pattern = SparsePattern.from_mask(
        g, tables, torch.zeros(heads, dtype=torch.int32), mask, tail, job.pool or g.block_k, expansions
    )
    with gluon_launch.set_aside():
        run(pattern, precision)
    check = partial(errors_of, q.device, dtype, job.head_dim, backend="triton", block_q=block_q, pool=job.pool)
    check(precision)
    scores = ScoreInputs(q, k, key_bias=bias)
    # Errors of blocks are measured on small grids only.
    for by_mass in (True,) if is_large(layout.grid_tokens) else (False, True):
        options = StatisticsOptions(COMPARED_DENSITY, job.order, job.pool, by_mass=by_mass)
        observe(scores, layout, block_q, options, v=v, backend="triton")
    if tail is not None:
        inputs = scores.with_values(v, g, of_heads)
        observe_bias(inputs, mask, pool=job.pool, expansions=expansions, rows=LEAST_ROWS, backend="triton")
    mean_query_masses(scores, g, of_heads, backend="triton")
    # The kernel of one GPU generation and rotated queries: the general kernel and plain queries stand in for them.
    launches.late_from_now = True
    run(dense, precision)
    run(pattern, precision)
    check(precision, special=True)
    rotated = precision.rotated
    if rotated is not None:
        run(pattern, rotated)
        check(rotated)
