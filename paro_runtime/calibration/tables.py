"""What the blocks of a site are worth, as masks are chosen by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Worth:
    """What the blocks of a site are worth, comparable across heads and sites: table `[H, q_blocks, k_blocks]` over unit
    `[H]`, or as it is."""

    table: torch.Tensor
    unit: torch.Tensor | None = None

    def on(self, device: torch.device | str) -> torch.Tensor:
        """float32 `[H, q_blocks, k_blocks]`."""
        table = self.table.to(device).float()
        return table if self.unit is None else table / self.unit.to(table)[:, None, None]

    def __getitem__(self, key) -> Worth:
        return Worth(self.table[key], self.unit)

    @property
    def shape(self) -> torch.Size:
        return self.table.shape

    @property
    def device(self) -> torch.device:
        return self.table.device

    def numel(self) -> int:
        return self.table.numel()
