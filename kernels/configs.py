"""Tile configurations of the attention kernel: one table, keyed by GPU generation, head dimension and precision.

No autotuning: compiling a candidate takes about a second, token counts differ with every resolution, and what is best
follows from the generation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """rows: query rows per program. pairs: two key blocks of 64 per step. warps, stages: Triton's launch options."""

    rows: int
    pairs: bool
    warps: int
    stages: int


def tile_for(capability: tuple[int, int], padded_dim: int, qk: str, pv: str, block_q: int, listed: bool) -> Tile:
    return Tile(64, capability[0] in (9, 10), 4, 3)
