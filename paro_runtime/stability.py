"""Do prompts and steps agree? Orders and masks that they would choose each for itself, compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch

from .plan import Site
from .selection import best_of_rows
from .statistics import Observation, first_best

# Query blocks per head whose masks are compared.
BLOCKS = 8


@dataclass(frozen=True)
class Glimpse:
    """One observation in short: the order it prefers and the one in use, int64 [H]; bool mask [H, BLOCKS, k_blocks]."""

    preferred: torch.Tensor
    used: torch.Tensor
    mask: torch.Tensor

    def on_cpu(self) -> Glimpse:
        """The same on the CPU."""
        return Glimpse(self.preferred.cpu(), self.used.cpu(), self.mask.cpu())


@dataclass(frozen=True)
class Stability:
    """Shares of heads that prefer the same order, and of kept blocks that are the same; None where nothing compares."""

    orders_between_steps: float | None = None
    masks_between_steps: float | None = None
    orders_between_prompts: float | None = None
    masks_between_prompts: float | None = None

    def as_dict(self) -> dict:
        """JSON-ready, rounded, without what could not be compared."""
        return {name: round(value, 4) for name, value in asdict(self).items() if value is not None}

    def text(self) -> str:
        """One line for people."""
        parts = [f"{name.replace('_', ' ')} {value:.0%}" for name, value in asdict(self).items() if value is not None]
        return "stability: " + (", ".join(parts) if parts else "one observation only")


def glimpse(seen: Observation, density: float) -> Glimpse:
    """What one observation would choose for itself at this density."""
    blocks = seen.mass.shape[1]
    rows = torch.linspace(0, blocks - 1, min(BLOCKS, blocks), device=seen.mass.device).round().long()
    mask = best_of_rows(seen.mass[:, rows], density)
    # Where they were made: most runs have nothing to compare them with.
    return Glimpse(first_best(seen.scores), seen.choice, mask)


def _pair(a: Glimpse, b: Glimpse) -> tuple[float, float | None]:
    same = a.used == b.used
    orders = (a.preferred == b.preferred).float().mean().item()
    if not same.any():
        return orders, None
    both = (a.mask & b.mask)[same].sum()
    return orders, (both / a.mask[same].sum().clamp_min(1)).item()


def compare(seen: Mapping[tuple[Site, int, int], Glimpse]) -> Stability:
    """Neighbouring steps of one prompt, and neighbouring prompts at one step, over all sites."""
    found: dict[str, list] = {"steps": [], "prompts": []}
    for kind, along in (("steps", 2), ("prompts", 1)):
        lines: dict[tuple, list] = {}
        for key in sorted(seen):
            rest = tuple(part for i, part in enumerate(key) if i != along)
            lines.setdefault(rest, []).append(seen[key])
        for line in lines.values():
            found[kind] += [_pair(a, b) for a, b in pairwise(line)]

    def mean(kind: str, column: int) -> float | None:
        values = [pair[column] for pair in found[kind] if pair[column] is not None]
        return sum(values) / len(values) if values else None

    return Stability(mean("steps", 0), mean("steps", 1), mean("prompts", 0), mean("prompts", 1))
