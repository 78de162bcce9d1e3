"""From block statistics to orders, masks and the tail's bias.

Masks come from one threshold over all heads and sites (a head that needs more blocks gets more), after the blocks that
must stay (the best of every row, a floor per head) are set aside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .tables import Worth

# A head keeps at least this share of the density that was asked for: diffuse heads must not be starved.
HEAD_FLOOR = 0.25
# Threshold search looks at no more values than this; beyond it a regular subsample decides.
THRESHOLD_VALUES = 1 << 24
# The same for the comparison of orders, of each head, and for masks of given counts.
RANKED_VALUES, COUNTED_VALUES = 4096, 1 << 15
# The density that keeps a wanted share of the attention is sought to this precision, on at most about so many blocks.
DENSITY_STEP = 1 / 512
TARGET_VALUES = 1 << 22


def _must_keep(mass: torch.Tensor, density: float) -> torch.Tensor:
    """Blocks that stay whatever the threshold: the best of every row and the head's floor. bool like mass."""
    keep = _best_of_every_row(mass)
    floor = int(density * HEAD_FLOOR * mass[0].numel())
    if floor:
        best = mass.flatten(1).topk(floor, 1).indices
        keep.flatten(1).scatter_(1, best, True)
    return keep


class SharedBudget:
    """Masks of several sites, for some densities, by one threshold for each density: made one site at a time.

    worths: of each site, `[H, q_blocks, k_blocks]`. The mean density over all sites is the one asked for, or more where
    the blocks that must stay demand it. Works on `device` with one site at a time (a site of 40 heads and 75,600 tokens
    has 28 million blocks). Of many blocks a regular sample decides.
    """

    def __init__(self, worths: Sequence[Worth], densities: Sequence[float], device: torch.device | str = "cpu") -> None:
        self._worths, self._densities, self._device = list(worths), densities, device
        total = sum(worth.numel() for worth in worths)
        self._exact = total <= THRESHOLD_VALUES
        self._floors: list[list[torch.Tensor]] = []
        samples: list[list[torch.Tensor]] = [[] for _ in densities]
        for worth in worths if min(densities) < 1 else ():
            value = worth.on(device)
            if self._exact:
                some = value.flatten(1)
                musts = [_must_keep(value, density).flatten(1) for density in densities]
            else:
                stride = sample_stride(total / THRESHOLD_VALUES, worth.shape[2])
                some = value.flatten(1)[:, ::stride]
                floors = _floors(some, densities)
                best = _best_of_every_row(value).flatten(1)[:, ::stride]
                musts = [best | (some >= floor[:, None]) for floor in floors]
                self._floors.append(floors)
            for sample, must in zip(samples, musts, strict=True):
                sample.append(some.masked_fill(must, math.inf).flatten())
        self._thresholds = [
            _threshold(torch.cat(sample), density) if sample else 0.0
            for sample, density in zip(samples, densities, strict=True)
        ]

    def masks(self, site: int, device: torch.device | str | None = None) -> list[torch.Tensor]:
        """bool `[H, q_blocks, k_blocks]`, one for each density; on another device than the object's if one is given."""
        value = self._worths[site].on(self._device if device is None else device)
        of_rows = None if self._exact else _best_of_every_row(value)
        return [self._mask(site, number, value, of_rows) for number in range(len(self._densities))]

    def _mask(self, site: int, number: int, value: torch.Tensor, of_rows: torch.Tensor | None) -> torch.Tensor:
        density, threshold = self._densities[number], self._thresholds[number]
        if density >= 1:
            return torch.ones_like(value, dtype=torch.bool)
        if self._exact:
            return _must_keep(value, density).logical_or_(value >= threshold)
        # Where nearly all is zero the threshold is, too, and would keep every block.
        least = self._floors[site][number].to(value.device).clamp(1e-38, max(threshold, 1e-38))
        return (value >= least[:, None, None]).logical_or_(of_rows)


class PerHeadBudget:
    """As `SharedBudget`, with the same density in every head."""

    def __init__(self, worths: Sequence[Worth], densities: Sequence[float], device: torch.device | str = "cpu") -> None:
        self._worths, self._densities, self._device = list(worths), densities, device

    def masks(self, site: int, device: torch.device | str | None = None) -> list[torch.Tensor]:
        """See `SharedBudget.masks`."""
        value = self._worths[site].on(self._device if device is None else device)
        ranked = value.masked_fill(_best_of_every_row(value), math.inf).flatten(1)
        masks = []
        for density in self._densities:
            count = max(round(density * ranked.shape[1]), value.shape[1])
            best = ranked.topk(min(count, ranked.shape[1]), 1).indices
            masks.append(torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, best, True).view_as(value))
        return masks


def _best_of_every_row(value: torch.Tensor) -> torch.Tensor:
    """The best block of every row of blocks; bool like value."""
    return torch.zeros_like(value, dtype=torch.bool).scatter_(2, value.argmax(2, keepdim=True), True)


def _floors(some: torch.Tensor, densities: Sequence[float]) -> list[torch.Tensor]:
    """From which value on heads keep their floor, float32 `[H]` for each density, by a sample `[H, n]` of blocks."""
    ranked = some.sort(1, descending=True).values
    ranks = [round(density * HEAD_FLOOR * ranked.shape[1]) for density in densities]
    # Blocks that are worth nothing are not kept for the floor's sake.
    return [ranked[:, rank - 1].clamp_min(1e-38) if rank else ranked[:, 0] + math.inf for rank in ranks]


def _threshold(values: torch.Tensor, density: float) -> float:
    """From which value on blocks are kept, of values `[n]` with infinity for those that must stay: infinity if they
    are all that may."""
    count = round(density * values.numel())
    if density >= 1 or count <= int(values.isinf().sum()):
        return math.inf
    if values.is_cuda:  # where sorting all is faster than finding one
        return values.sort().values[values.numel() - count].item()
    return values.kthvalue(values.numel() - count + 1).values.item()


def masks_by(
    budget: type[SharedBudget] | type[PerHeadBudget],
    worths: Sequence[torch.Tensor],
    density: float,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """Masks of several sites for one density; each worth is `[H, q_blocks, k_blocks]`, each mask bool alike, on
    `device`."""
    made = budget([Worth(worth) for worth in worths], [density], device)
    return [made.masks(site, device)[0] for site in range(len(worths))]


def masks_of_counts(worth: torch.Tensor, counts: torch.Tensor) -> list[torch.Tensor]:
    """For each row of counts int64 `[n, H]` the best blocks of each head, as many as it says; each bool like worth
    `[H, q_blocks, k_blocks]`, on its device.

    The best block of every row is kept in any case, blocks that are worth nothing in none; of equally good ones all.
    Where a head has many blocks, what the last one must be worth is told by COUNTED_VALUES of them at least, so that it
    keeps a percent more or fewer and a GPU need not sort them all (28 million of one site at 75,600 tokens x 40 heads).
    """
    value = worth.float()
    value = value.scatter(2, value.argmax(2, keepdim=True), math.inf)
    flat = value.flatten(1)
    stride = sample_stride(flat.shape[1] // COUNTED_VALUES, worth.shape[2])
    ranked = flat[:, ::stride].sort(1, descending=True).values
    rank = (counts.T * (ranked.shape[1] / flat.shape[1])).round().long()
    least = ranked.gather(1, rank.clamp(1, ranked.shape[1]) - 1)
    return [(value >= its[:, None, None]) & (value > 0) for its in least.unbind(1)]


def density_for(
    masses: Sequence[Worth],
    worths: Sequence[Worth],
    target: float,
    most: float,
    choose: Callable[[list[torch.Tensor], float], list[torch.Tensor]],
    groups: Callable[[float], Sequence[float]] = lambda density: (density,),
    device: torch.device | str = "cpu",
) -> float:
    """The least density, at most `most`, whose masks keep `target` of the attention, mean over heads and sites.

    masses, worths: attention of each block and what blocks are kept by, both `[H, q_blocks, k_blocks]` per site; choose
    makes masks of worths on `device` and a density; groups: the densities of groups of steps that stand for one
    density, each group counts alike. Large tables are judged by every n-th row of blocks.
    """
    stride = max(1, math.ceil(sum(mass.numel() for mass in masses) / TARGET_VALUES))
    seen, judged = ([table[:, ::stride].on(device) for table in tables] for tables in (masses, worths))

    def kept(density: float) -> float:
        found = [
            mass_kept(mass, mask)
            for its in groups(density)
            for mass, mask in zip(seen, choose(judged, its), strict=True)
        ]
        return torch.cat(found).mean().item()

    low, high = 0.0, most
    while high - low > DENSITY_STEP:
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) >= target else (middle, high)
    return high


def mass_kept(mass: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Share of each head's grid attention inside its mask, float32 `[H]`."""
    mass = mass.float()
    return mass.mul(mask).sum((1, 2)) / mass.sum((1, 2)).clamp_min(1e-20)


def sample_stride(least: float, columns: int) -> int:
    """Stride of at least so much through rows of `columns` values: it comes to every column alike."""
    stride = max(1, math.ceil(least))
    while stride > 1 and math.gcd(stride, columns) > 1:
        stride += 1
    return stride
