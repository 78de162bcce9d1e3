"""Masks that a run measures itself: each head keeps the blocks that matter now.

What a head looks at follows the picture; how many blocks it wants hardly does. So plans of large grids, and those made
of little but noise, have no masks. In the first step of each group of sparse steps a few mean queries of every query
block tell which blocks are heaviest, and each head keeps as many of them as the plan says. In every step anew it would
gain next to nothing (`docs/method.md`).
"""

from __future__ import annotations

import torch

from ...kernels.core.block_mask import pack_bits
from ...kernels.core.inputs import ScoreInputs
from ...kernels.core.pattern import SparsePattern
from ...kernels.statistics.mean_queries import mean_query_masses
from ..attention.patterns import sent
from ..calibration.mask_choice import masks_of_counts
from ..plan.plan import SitePlan


def routed_bits(
    entry: SitePlan, group: int, scores: ScoreInputs, pattern: SparsePattern, backend: str = "auto"
) -> torch.Tensor:
    """A site's mask in a group of steps, by this call: packed uint8 `[bytes]` on q's device, which nothing waits for.
    pattern: the entry's own, without a mask."""
    tables = pattern.tables_of_heads(scores.heads)
    masses = mean_query_masses(scores, pattern.geometry, tables, backend=backend)
    counts = (entry.density[group : group + 1] * masses[0].numel()).round().long()
    return pack_bits(masks_of_counts(masses, sent(counts, masses.device))[0])
