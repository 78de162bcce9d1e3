"""Sums over the observations of one site."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

from .statistics import Observation

# Larger block tables are kept in 16 bits: 40 sites of a 720p model would not fit the memory otherwise. bfloat16, since
# errors span many powers of ten.
FULL_PRECISION_ELEMENTS = 1 << 22


@dataclass
class SiteSums:
    """Sums on the CPU; `weight` counts, per head, the observations under its present order. H = query heads.

    scores [H, candidates]; choice int64 [H]; weight int64 [H]; mass, pooled, error [H, q_blocks, k_blocks]; falloff
    [H, bins], of every order; curves [H, densities, biases] and energy [H] as in `tail.TailObservation`. done: (prompt,
    step) of what is summed.
    """

    candidates: tuple[str, ...]
    scores: torch.Tensor
    choice: torch.Tensor
    weight: torch.Tensor
    mass: torch.Tensor
    falloff: torch.Tensor
    pooled: torch.Tensor | None = None
    error: torch.Tensor | None = None
    curves: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    done: set[tuple[int, int]] = field(default_factory=set)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is a tensor, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def add(self, more: SiteSums) -> None:
        """Fold in one more observation; heads whose order changed start anew with it."""
        same = more.choice == self.choice
        self.scores = self.scores + more.scores
        self.falloff = self.falloff + more.falloff
        self.choice = more.choice
        self.weight = self.weight.where(same, 0) + more.weight
        for name in ("mass", "pooled", "error", "curves", "energy"):
            total, new = getattr(self, name), getattr(more, name)
            if total is not None and new is not None:
                keep = same.view(-1, *[1] * (total.dim() - 1))
                setattr(self, name, (total.float().where(keep, 0) + new.float()).to(total.dtype))


def stored(seen: Observation, with_error: bool) -> SiteSums:
    """One observation as sums of one; the errors of single blocks are large and kept only where they are wanted."""
    dtype = torch.float32 if seen.mass.numel() <= FULL_PRECISION_ELEMENTS else torch.bfloat16

    def table(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(dtype).cpu()

    tail = seen.tail
    return SiteSums(
        seen.candidates,
        seen.scores.cpu(),
        seen.choice.cpu(),
        torch.ones(seen.choice.shape[0], dtype=torch.long),
        table(seen.mass),
        seen.falloff.cpu(),
        table(seen.pooled),
        table(tail.error) if tail is not None and with_error else None,
        None if tail is None else tail.curves.cpu(),
        None if tail is None else tail.energy.cpu(),
    )
