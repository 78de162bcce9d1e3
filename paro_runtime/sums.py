"""Sums over the observations of one site."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

from .statistics import Observation

# Larger block tables are kept in 16 bits: 40 sites of a 720p model would not fit the memory otherwise. bfloat16, since
# errors span many powers of ten.
FULL_PRECISION_ELEMENTS = 1 << 22


# Query blocks whose mass is kept where blocks are not chosen by it.
MASS_BLOCKS = 128
# Tensors from this size on reach the CPU through pinned memory.
PINNED_BYTES = 1 << 20


def some_blocks(q_blocks: int) -> torch.Tensor:
    """The query blocks of a mass of MASS_BLOCKS, int64, rising."""
    return torch.linspace(0, q_blocks - 1, min(q_blocks, MASS_BLOCKS)).round().long()


def to_cpu(x: torch.Tensor) -> torch.Tensor:
    """x on the CPU, in ordinary memory. Straight there a GPU's copy runs at a twentieth of the bus's speed."""
    if not x.is_cuda or x.nbytes < PINNED_BYTES:
        return x.cpu()
    # Torch keeps freed pinned memory for the next site, so one buffer serves all.
    try:
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:  # the system allows no more of it
        return x.cpu()
    return pinned.copy_(x).clone()


@dataclass
class SiteSums:
    """Sums on the CPU; `weight` counts, per head, the observations under its present order. H = query heads.

    With errors the mass is only told to people: it is that of up to MASS_BLOCKS query blocks, evenly spread.
    scores [H, candidates]; choice int64 [H]; weight int64 [H]; mass, pooled, error [H, q_blocks, k_blocks]; falloff
    [H, bins], of every order; received [H, k_blocks]: mass over all query blocks; curves [H, densities, biases] and
    energy [H] as in `tail.TailObservation`; logit_errors [H, 3] as in `rotation`. done: (prompt, step) of what is
    summed.
    """

    candidates: tuple[str, ...]
    scores: torch.Tensor
    choice: torch.Tensor
    weight: torch.Tensor
    mass: torch.Tensor
    falloff: torch.Tensor
    received: torch.Tensor
    pooled: torch.Tensor | None = None
    error: torch.Tensor | None = None
    curves: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    logit_errors: torch.Tensor | None = None
    done: set[tuple[int, int]] = field(default_factory=set)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is a tensor, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def mask_of_mass(self, mask: torch.Tensor) -> torch.Tensor:
        """The rows of a mask `[H, q_blocks, k_blocks]` that `mass` is about."""
        if mask.shape[1] == self.mass.shape[1]:
            return mask
        return mask[:, some_blocks(mask.shape[1]).to(mask.device)]

    def add(self, more: SiteSums) -> None:
        """Fold in one more observation; heads whose order changed start anew with it."""
        same = more.choice == self.choice
        self.scores = self.scores + more.scores
        self.falloff = self.falloff + more.falloff
        self.choice = more.choice
        self.weight = self.weight.where(same, 0) + more.weight
        for name in ("mass", "received", "pooled", "error", "curves", "energy", "logit_errors"):
            total, new = getattr(self, name), getattr(more, name)
            if total is not None and new is not None:
                keep = same.view(-1, *[1] * (total.dim() - 1))
                setattr(self, name, (total.float().where(keep, 0) + new.float()).to(total.dtype))


def stored(seen: Observation, with_error: bool) -> SiteSums:
    """One observation as sums of one; the errors of single blocks are large and kept only where they are wanted."""
    dtype = torch.float32 if seen.mass.numel() <= FULL_PRECISION_ELEMENTS else torch.bfloat16

    def table(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else to_cpu(x.to(dtype))

    tail, mass = seen.tail, seen.mass
    if tail is not None and with_error and seen.pooled is None:
        mass = mass[:, some_blocks(mass.shape[1]).to(mass.device)]
    return SiteSums(
        seen.candidates,
        seen.scores.cpu(),
        seen.choice.cpu(),
        torch.ones(seen.choice.shape[0], dtype=torch.long),
        table(mass),
        seen.falloff.cpu(),
        seen.mass.sum(1).cpu(),
        table(seen.pooled),
        table(tail.error) if tail is not None and with_error else None,
        None if tail is None else tail.curves.cpu(),
        None if tail is None else tail.energy.cpu(),
        None if seen.logit_errors is None else seen.logit_errors.cpu(),
    )
