"""The suite `tiny` on this model: its samplings, plans and comparisons at real sizes, and on a GPU PARO's kernels."""

from pathlib import Path

import torch

from ...paro_runtime.plan.plan import ModelIdentity
from ..paro_bench.tiny import TinyBench
from . import samples
from .codec import decode
from .flow import SHIFT
from .model import load_large_wan


class LargeBench(TinyBench):
    """The model and its dense runs on one grid; see `TinyBench`.

    `Variant.backend` says what runs the sparse calls: `reference` anywhere, `triton` or `auto` on a GPU, where the
    model should compute in a 16-bit `dtype`. Grids of more than 8,192 tokens have query blocks of 128 rows, smaller
    ones of 64.
    """

    identity, steps, shift = ModelIdentity("wan", "large", "large"), samples.STEPS, SHIFT
    decode = staticmethod(decode)

    def __init__(
        self,
        grid: tuple[int, int, int],
        weights: Path,
        device: str = "cpu",
        seeds: tuple[int, ...] = (1000, 1001, 1002, 1003),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`weights`: packed ones (see `pack`). All clips of `seeds` are sampled densely at once."""
        self.weights, self.dtype = weights, dtype
        super().__init__(grid, device, seeds)

    def load(self):
        """The model on the device, in `dtype`; how many layers and heads there are is read off it."""
        model = load_large_wan(self.weights, self.dtype, self.device)
        self.layers, self.heads = model.cfg.layers, model.cfg.heads
        return model

    def start(self, seeds) -> tuple[torch.Tensor, torch.Tensor]:
        """See `samples.start`."""
        return samples.start(tuple(seeds), self.grid)
