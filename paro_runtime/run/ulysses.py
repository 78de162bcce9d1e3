"""Several GPUs for one picture: heads split over processes ("ranks") for attention, the sequence for everything else.

Each rank holds a part of the sequence. Before attention an all-to-all turns that into the whole sequence of a part of
the heads, after it another one turns the result back (Ulysses sequence parallelism). Every number PARO measures belongs
to one head, so a rank needs no more than its own heads' part of a plan (`Plan.of_rank`), and a `Session` of its own
that sees whole sequences. What goes wrong on one rank ends in that rank's dense attention: nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ..calibration.accumulator import SiteSums
from ..calibration.calibrator import Calibrator
from ..plan.plan import Plan, PlanError


class Ulysses:
    """Attention of a sequence that the ranks of a process group hold in parts.

    streams: token counts that the sequence consists of, each cut into equal parts by itself: `(75600,)` for one cut as
    a whole, `(512, 4096)` where a rank holds its part of the text and then its part of the picture. A part that comes
    out short is padded at the end of the last rank; attention never sees the padding, whose results are zero.
    group: the process group, default all ranks. All of its ranks must make the same calls in the same order.
    """

    def __init__(self, streams: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.streams = tuple(streams)
        self.local = sum(-(-length // self.ranks) for length in self.streams)
        self._places: dict[torch.device, torch.Tensor] = {}

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.streams)

    def attend(
        self,
        attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """q `[B, Hq, local, D]`, k and v `[B, Hkv, local, D]`, this rank's tokens of all heads -> `[B, Hq, local, D]`.

        attention: of whole sequences, q `[B, Hq / ranks, length, D]`, k and v `[B, Hkv / ranks, length, D]` -> like q;
        heads are those of `heads_of_rank`. Raises ValueError for heads that do not divide and for other lengths, on
        every rank alike and before anything is sent.
        """
        heads = [x.shape[1] for x in (q, k, v)]
        if any(count % self.ranks for count in heads):
            counts = f"{heads[0]} query and {heads[1]} key heads"
            raise ValueError(f"ulysses: {counts} do not divide over {self.ranks} ranks")
        if {x.shape[2] for x in (q, k, v)} != {self.local}:
            expected = f"{self.streams} over {self.ranks} ranks make {self.local}"
            raise ValueError(f"ulysses: {[x.shape[2] for x in (q, k, v)]} tokens of q, k, v on a rank, {expected}")
        # One exchange for all three: `[ranks, B, heads, local, D]`, by the rank whose heads they are.
        sent = torch.cat([x.unflatten(1, (self.ranks, -1)).movedim(1, 0) for x in (q, k, v)], 2)
        received = self._exchanged(sent).permute(1, 2, 0, 3, 4).flatten(2, 3)
        whole = self.ordered(received).split([count // self.ranks for count in heads], 1)
        out = self.parted(attention(*whole)).unflatten(2, (self.ranks, -1)).movedim(2, 0)
        return self._exchanged(out.contiguous()).movedim(0, 1).flatten(1, 2)

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """What the ranks hold, one behind the other `[B, H, ranks * local, D]` -> the streams one behind the other,
        without padding `[B, H, length, D]`. For use behind another library's all-to-all."""
        return x.index_select(2, self._place(x.device))

    def parted(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse of `ordered`, with zeros for padding."""
        shape = (*x.shape[:2], self.ranks * self.local, x.shape[3])
        return x.new_zeros(shape).index_copy_(2, self._place(x.device), x)

    def _place(self, device: torch.device) -> torch.Tensor:
        """Where each token is in what the ranks hold, one behind the other: int64 `[length]`."""
        if device not in self._places:
            found, first = [], 0
            for length in self.streams:
                part = -(-length // self.ranks)
                token = torch.arange(length)
                found.append(token // part * self.local + first + token % part)
                first += part
            self._places[device] = torch.cat(found).to(device)
        return self._places[device]

    def _exchanged(self, x: torch.Tensor) -> torch.Tensor:
        """Contiguous `[ranks, ...]`, by receiver -> by sender."""
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.group)
        return received


def several_ranks() -> bool:
    """Whether other processes take part in what this one does, as `torch.distributed` knows it."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def plan_of_all(calibrator: Calibrator, made: dict, group: dist.ProcessGroup | None = None) -> Plan:
    """One plan of all heads, its budgets shared among them, from what each rank's calibrator observed of its own heads
    (`heads_of_rank`): the one that a single process would make. Every rank must call this, and gets it. Raises
    PlanError, on every rank, when nothing was observed, or not the same calls on all of them."""
    seen: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(seen, calibrator.sums(), group)
    observed = [{site: sums.done for site, sums in its.items()} for its in seen]
    if any(its != observed[0] for its in observed):
        raise PlanError("calibration: the ranks did not observe the same calls")
    return calibrator.with_sums({site: SiteSums.joined([its[site] for its in seen]) for site in seen[0]}).plan(made)
