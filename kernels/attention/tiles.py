"""Tile configurations of the attention kernel: one table, keyed by GPU generation, head dimension and precision.

No autotuning: compiling a candidate takes seconds, token counts differ with every resolution, and what is best follows
from the generation. `python scripts/check_kernels.py` compiles every entry; measurements: `docs/kernels_history.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.precision import Precision


@dataclass(frozen=True)
class Tile:
    """rows: query rows per program. pairs: two key blocks of 64 per step. warps, stages: Triton's launch options."""

    rows: int
    pairs: bool
    warps: int
    stages: int


@dataclass(frozen=True)
class Entry:
    """A tile for query blocks of 128 rows, one for query blocks of 64 rows, and why; `dense` for calls that keep every
    block, where `wide` does not serve them too."""

    wide: Tile
    narrow: Tile
    reason: str
    dense: Tile | None = None


# Keys: (generation, or architecture with its minor version left open, padded head dimension, products). Products: `16`
# both in 16 bits, `8+16` INT8 QK and 16-bit PV, `8+8` both in 8 bits. Head dimension 32 uses the entry of 64.
TILES = {
    ("hopper", 128, "8+16"): Entry(
        Tile(128, True, 8, 3),
        Tile(64, True, 4, 2),
        "measured on an H100: 64 rows read twice the K and V per row from L2 and stall on it (38.9 ms for 128 rows, "
        "52.6 for 64); where the mask wants 64 rows, pairs need 9.9 issue slots and single blocks 12.2, and two stages "
        "leave room for two programs per SM (first version, density 0.3: pairs 17.3 ms, single blocks 16.3)",
    ),
    ("hopper", 128, "8+8"): Entry(
        Tile(64, True, 4, 3),
        Tile(64, True, 4, 3),
        "measured on an H100: V is half as large, so two programs of 64 rows per SM win by overlap (9.7 against 10.8 "
        "ms at density 0.3, equal when dense)",
    ),
    ("hopper", 128, "16"): Entry(
        Tile(128, True, 8, 2),
        Tile(64, True, 4, 2),
        "measured on an H100: 53.9 ms for 128 rows, 81.2 for 64; a third stage leaves no shared memory",
    ),
    ("hopper", 64, "8+16"): Entry(
        Tile(128, True, 8, 3), Tile(64, True, 4, 3), "not measured; by analogy with D = 128, 8.9 to 9.1 issue slots"
    ),
    ("hopper", 64, "8+8"): Entry(
        Tile(64, True, 4, 3), Tile(64, True, 4, 3), "not measured; three programs per SM, 9.0 issue slots (fp8)"
    ),
    ("hopper", 64, "16"): Entry(Tile(128, True, 8, 3), Tile(64, True, 4, 3), "not measured"),
    ("hopper", 256, "8+16"): Entry(Tile(64, False, 8, 2), Tile(64, False, 8, 2), "not measured; fits without spills"),
    ("hopper", 256, "8+8"): Entry(Tile(64, False, 8, 2), Tile(64, False, 8, 2), "not measured; fits without spills"),
    ("hopper", 256, "16"): Entry(Tile(64, False, 8, 2), Tile(64, False, 8, 2), "not measured; fits without spills"),
    ("mma", 128, "8+16"): Entry(
        Tile(128, False, 8, 3),
        Tile(64, False, 4, 3),
        "not measured; 15 issue slots with either number of rows; tensor cores bind on these GPUs anyway",
    ),
    ("mma", 128, "8+8"): Entry(Tile(128, False, 8, 3), Tile(64, False, 4, 3), "not measured; as with 16-bit PV"),
    ("mma", 128, "16"): Entry(
        Tile(64, False, 4, 2),
        Tile(64, False, 4, 2),
        "not measured; two stages fit 99 KB; 128 rows spill on sm_86 and sm_89, dense and in the tail",
    ),
    ("sm_12x", 128, "16"): Entry(
        Tile(64, False, 8, 2),
        Tile(64, False, 4, 2),
        "not measured; 128 rows spill in the tail",
        dense=Tile(128, False, 8, 2),
    ),
    ("sm_12x", 128, "8+8"): Entry(
        Tile(64, False, 4, 3),
        Tile(64, False, 4, 3),
        "not measured; 128 rows would spill in the tail (Triton 3.7), 64 rows without a list do",
        dense=Tile(128, False, 8, 3),
    ),
    ("mma", 64, "8+16"): Entry(
        Tile(128, False, 8, 3), Tile(64, False, 4, 3), "not measured; 4 warps need 9.5 issue slots, not 11, but spill"
    ),
    ("mma", 64, "8+8"): Entry(Tile(128, False, 8, 3), Tile(64, False, 4, 3), "not measured; likewise"),
    ("mma", 64, "16"): Entry(Tile(128, False, 8, 3), Tile(64, False, 4, 3), "not measured"),
    ("mma", 256, "8+16"): Entry(Tile(64, False, 8, 2), Tile(64, False, 8, 2), "not measured; shared memory binds"),
    ("mma", 256, "8+8"): Entry(Tile(64, False, 8, 2), Tile(64, False, 8, 2), "not measured; shared memory binds"),
    ("mma", 256, "16"): Entry(Tile(64, False, 8, 1), Tile(64, False, 8, 1), "not measured; shared memory binds"),
    ("blackwell", 128, "8+16"): Entry(
        Tile(128, False, 8, 3), Tile(64, False, 4, 3), "not measured; before Triton 3.9 its INT8 is mma.sync"
    ),
    ("blackwell", 128, "8+8"): Entry(
        Tile(64, False, 4, 2),
        Tile(64, False, 4, 3),
        "not measured; pairs would spill, and rotated queries with a third stage",
        dense=Tile(64, False, 4, 3),
    ),
    ("blackwell", 128, "16"): Entry(Tile(128, False, 8, 2), Tile(64, False, 4, 2), "not measured"),
    ("blackwell", 64, "8+16"): Entry(Tile(128, False, 8, 3), Tile(64, False, 4, 3), "not measured"),
    ("blackwell", 64, "8+8"): Entry(Tile(64, False, 4, 3), Tile(64, False, 4, 3), "not measured"),
    ("blackwell", 64, "16"): Entry(Tile(128, False, 8, 2), Tile(64, False, 4, 2), "not measured"),
    ("blackwell", 256, "8+16"): Entry(Tile(64, False, 8, 2), Tile(64, False, 8, 2), "not measured"),
    ("blackwell", 256, "8+8"): Entry(Tile(64, False, 8, 2), Tile(64, False, 8, 2), "not measured"),
    ("blackwell", 256, "16"): Entry(Tile(64, False, 8, 2), Tile(64, False, 8, 2), "not measured"),
}
# AMD, untested on hardware: compiles; 64 rows keep the register count down, more than two stages do nothing there.
AMD_TILE = Tile(64, False, 4, 2)


def generation(capability: tuple[int, int]) -> str:
    """Which instructions a GPU multiplies with: `hopper` wgmma, `blackwell` (data centre) tcgen05, `mma` all others."""
    return {9: "hopper", 10: "blackwell"}.get(capability[0], "mma")


def products(precision: Precision) -> str:
    """The precision as the table names it; 4-bit values are multiplied in 8 bits."""
    if not precision.keys.rounds:
        return "16"
    return "8+8" if precision.values.rounds else "8+16"


def tile_for(
    capability: tuple[int, int] | None, padded_dim: int, precision: Precision, block_q: int, listed: bool
) -> Tile:
    """The tile of a call: query blocks of `block_q` rows with a list of kept blocks, or dense. None: an AMD GPU."""
    if capability is None:
        return AMD_TILE
    rest = (max(64, padded_dim), products(precision))
    exact = (f"sm_{capability[0]}x", *rest)
    entry = TILES[exact] if exact in TILES else TILES[(generation(capability), *rest)]
    if not listed:
        return entry.dense or entry.wide
    return entry.narrow if block_q == 64 else entry.wide


def needs_separate_tail(capability: tuple[int, int] | None, tile: Tile, padded_dim: int, precision: Precision) -> bool:
    """Whether the tail's product must not run into the accumulator (see `triton_softmax_steps.pooled_tail`).

    In 16 bits only where it would spill otherwise: D = 256 on Hopper, tall tiles on sm_120.
    """
    if capability is None:
        return False
    if generation(capability) == "hopper":
        return precision.values.rounds or padded_dim > 128
    return capability[0] == 12 and not precision.keys.rounds and padded_dim == tile.rows == 128


def tail_stages(capability: tuple[int, int] | None, tile: Tile) -> int:
    """Pipeline stages of the loop over the pooled tail: with three, 8-bit kernels spill in it on sm_120."""
    mma = capability is not None and generation(capability) == "mma"
    return min(tile.stages, 2) if mma else tile.stages


def in_channel_halves(capability: tuple[int, int] | None, tile: Tile, padded_dim: int, precision: Precision) -> bool:
    """Whether P V is done in two square products, on GPUs with mma.sync (see `triton_softmax_steps.one_block`).

    Not in 16 bits on sm_120, which would spill.
    """
    if capability is None or generation(capability) != "mma":
        return False
    if capability[0] == 12 and not precision.keys.rounds:
        return False
    return not tile.pairs and padded_dim == 2 * tile.rows
