"""Sums over the observations of one site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import TypeVar

import torch

from .observe import Observation
from .tables import Worth

# Where a run has one or two observations, larger tables of blocks are kept in 16 bits: it has them all on its GPU.
# bfloat16, since errors span many powers of ten.
FULL_PRECISION_ELEMENTS = 1 << 18
Table = TypeVar("Table", torch.Tensor, Worth)
# Query blocks whose mass is kept where blocks are not chosen by it.
MASS_BLOCKS = 128


def some_blocks(q_blocks: int, device: torch.device) -> torch.Tensor:
    """The query blocks of a mass of MASS_BLOCKS, int64, rising."""
    return _spread(q_blocks, min(q_blocks, MASS_BLOCKS), device)


@lru_cache(maxsize=16)
def _spread(blocks: int, count: int, device: torch.device) -> torch.Tensor:
    # Worked out on the CPU: another device may round another way.
    return torch.linspace(0, blocks - 1, count).round().long().to(device)


@dataclass
class SiteSums:
    """Sums; `weight` counts, per head, the observations under its present order. H = query heads.

    With errors the mass is only told to people: it is that of up to MASS_BLOCKS query blocks, evenly spread.
    scores [H, candidates]; choice int64 [H]; weight int64 [H]; mass, error [H, q_blocks, k_blocks]; curves
    [H, densities, biases] and energy [H] as in `tail_fit.TailObservation`; logit_errors [H, 3] as in
    `observe.Observation`. done: (prompt, step) of what is summed.
    """

    candidates: tuple[str, ...]
    scores: torch.Tensor
    choice: torch.Tensor
    weight: torch.Tensor
    mass: torch.Tensor
    error: torch.Tensor | None = None
    curves: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    logit_errors: torch.Tensor | None = None
    done: set[tuple[int, int]] = field(default_factory=set)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is a tensor, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def _with(self, tensors: dict[str, torch.Tensor]) -> SiteSums:
        """The same with these tensors in place of `tensors()`."""
        return SiteSums(self.candidates, done=self.done, **tensors)

    def on_cpu(self) -> SiteSums:
        """The same on the CPU."""
        return self._with({name: value.cpu() for name, value in self.tensors().items()})

    @classmethod
    def joined(cls, parts: Sequence[SiteSums]) -> SiteSums:
        """Those of all heads, from those of some heads each, in order, of the same observations."""
        columns = [part.tensors() for part in parts]
        return parts[0]._with({name: torch.cat([its[name] for its in columns]) for name in columns[0]})

    def mask_of_mass(self, mask: Table) -> Table:
        """The rows of a mask or of worths `[H, q_blocks, k_blocks]` that `mass` is about."""
        if mask.shape[1] == self.mass.shape[1]:
            return mask
        return mask[:, some_blocks(mask.shape[1], mask.device)]

    def add(self, more: SiteSums) -> None:
        """Fold in one more observation; heads whose order changed start anew with it."""
        same = more.choice == self.choice
        self.scores = self.scores + more.scores
        self.choice = more.choice
        self.weight = self.weight.where(same, 0) + more.weight
        for name in ("mass", "error", "curves", "energy", "logit_errors"):
            total, new = getattr(self, name), getattr(more, name)
            if total is None or new is None:
                continue
            keep = same.view(-1, *[1] * (total.dim() - 1))
            setattr(self, name, (total.float().where(keep, 0) + new.float()).to(total.dtype))


def stored(seen: Observation, with_error: bool, compact: bool) -> SiteSums:
    """One observation as sums of one, where it was made; the errors of single blocks are large and kept only where they
    are wanted. compact: large tables in 16 bits."""

    def table(x: torch.Tensor | None) -> torch.Tensor | None:
        return x.bfloat16() if x is not None and compact and x.numel() > FULL_PRECISION_ELEMENTS else x

    tail, mass = seen.tail, seen.mass
    with_error = with_error and tail is not None and tail.error is not None
    if with_error:
        mass = mass[:, some_blocks(mass.shape[1], mass.device)]
    return SiteSums(
        seen.candidates,
        seen.scores,
        seen.choice,
        torch.ones_like(seen.choice),
        table(mass),
        table(tail.error) if with_error else None,
        None if tail is None else tail.curves,
        None if tail is None else tail.energy,
        seen.logit_errors,
    )
