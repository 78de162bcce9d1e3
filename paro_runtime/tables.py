"""Tables of a number for every block, while a run is on: where they are kept, and in how many bits.

A site of a 14B model at 720p has 28 million blocks, and 40 such sites are looked at before a plan is made. What is
summed of single blocks is an estimate from a few rows, and only its ranks count: a byte for each is enough.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Steps of a code: a value is met within 4.5 %, and the smallest is 2^-31.75 of its head's largest.
STEPS_PER_OCTAVE = 8
# Tensors from this size on reach the CPU through pinned memory, and lie in memory of their own there.
PINNED_BYTES = 1 << 20


def empty_on_host(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised, on the CPU. Large ones go back to the system with the last tensor on their memory: an allocator
    that keeps what it is given back finds it a few bytes too short when aligned memory of the same size is asked for,
    and a run whose masks change would end with both sets."""
    size = math.prod(shape) * dtype.itemsize
    if size < PINNED_BYTES:
        return torch.empty(shape, dtype=dtype)
    # Private where the system tells private from shared: a process that is forked must not write into it.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=dtype).view(shape)


def to_cpu(x: torch.Tensor) -> torch.Tensor:
    """x on the CPU, in ordinary memory. Straight there a GPU's copy runs at a twentieth of the bus's speed."""
    if not x.is_cuda or x.nbytes < PINNED_BYTES:
        return x.cpu()
    # Torch keeps freed pinned memory for the next site, so one buffer serves all.
    try:
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError:  # the system allows no more of it
        return x.cpu()
    return empty_on_host(x.shape, x.dtype).copy_(pinned.copy_(x))


class Offload:
    """Brings tensors of a GPU to the CPU without waiting for it: what was copied last is taken out of its pinned buffer
    when the next comes, long after it has arrived."""

    def __init__(self) -> None:
        self._under_way: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event] | None = None

    def take(self, x: torch.Tensor, found: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor on the CPU, found or a new one, that holds x after the next `take` or `finish`."""
        self.finish()
        found = empty_on_host(x.shape, x.dtype) if found is None else found
        if not x.is_cuda:
            return found.copy_(x)
        try:
            pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        except RuntimeError:  # the system allows no more of it
            return found.copy_(x)
        pinned.copy_(x, non_blocking=True)
        self._under_way = (pinned, found, torch.cuda.current_stream(x.device).record_event())
        return found

    def finish(self) -> None:
        """Everything that was taken has arrived."""
        if self._under_way is not None:
            pinned, found, event = self._under_way
            self._under_way = None
            event.synchronize()
            # It may have been made under inference mode, outside of which it could not be written.
            with torch.inference_mode():
                found.copy_(pinned)


@dataclass(frozen=True, eq=False)
class CodedTable:
    """Numbers that are not negative, as logarithms relative to the largest of their head, in a byte each.

    codes uint8 `[H, ...]`, 0 for zero and for what is too small; peak float32 `[H]`. It answers to what is asked of a
    tensor here: shape, numel, nbytes, device, to, float, and slices that leave the heads alone.
    """

    codes: torch.Tensor
    peak: torch.Tensor

    @classmethod
    def of(cls, table: torch.Tensor) -> CodedTable:
        """Encode `[H, ...]`, any floating dtype."""
        peak = table.flatten(1).amax(1).float()
        # A head that holds nothing has code 0 everywhere.
        relative = table / _of_heads(peak.clamp_min(1e-38), table)
        codes = relative.float().log2_().mul_(STEPS_PER_OCTAVE).add_(255).round_().clamp_(0, 255)
        return cls(codes.to(torch.uint8), peak)

    def float(self) -> torch.Tensor:
        """float32, decoded."""
        values = self.codes.float().sub_(255).div_(STEPS_PER_OCTAVE).exp2_().mul_(_of_heads(self.peak, self.codes))
        return values.masked_fill_(self.codes == 0, 0)

    def to(self, device: torch.device | str) -> CodedTable:
        if torch.device(device).type == "cpu":
            return CodedTable(to_cpu(self.codes), self.peak.cpu())
        return CodedTable(self.codes.to(device), self.peak.to(device))

    def __getitem__(self, key) -> CodedTable:
        return CodedTable(self.codes[key], self.peak)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def numel(self) -> int:
        return self.codes.numel()


Table = torch.Tensor | CodedTable


def _of_heads(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True, eq=False)
class Worth:
    """What the blocks of a site are worth, comparable across heads and sites: table `[H, q_blocks, k_blocks]` over unit
    `[H]`, or as it is."""

    table: Table
    unit: torch.Tensor | None = None

    def on(self, device: torch.device | str) -> torch.Tensor:
        """float32 `[H, q_blocks, k_blocks]`."""
        table = self.table.to(device)
        if isinstance(table, CodedTable):
            table = table.float()
        if self.unit is not None:
            table = table / self.unit.to(table.device, table.dtype)[:, None, None]
        return table.float()

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
