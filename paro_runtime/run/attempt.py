"""One attempt at an evaluation of the model: what it counted, and which of its results are still to be looked at.

The kernels raise a flag over a result that is not finite. Asking for it at once would make the host wait for the device
in every call, so the flags come to the host by themselves and are looked at together when the evaluation is over. If
one was raised the evaluation is made again, without the sites at fault, and nothing that this attempt counted stays.

What is measured for later steps would remember what is not finite: before the first sparse call of an attempt what is
known is saved, and put back if the attempt fails. Observations, which are large, are made only once the results so far
have been looked at; that waits for the attention before this one, not for what the model has launched since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..attention.patterns import pinned_like
from ..plan.plan import Site
from .run_log import Counts, RunLog

FLAGS_AT_ONCE = 64


class Flag(NamedTuple):
    """int32 `[4]`, zero: 16 bytes, as the kernels want their pointers. on_host: where it goes, itself on a CPU."""

    on_device: torch.Tensor
    on_host: torch.Tensor


@dataclass(frozen=True)
class _Result:
    """A result that nobody has looked at: of which site (None: of dense attention), its flag on the host, and when it
    is there (None: it is)."""

    site: Site | None
    flag: torch.Tensor
    there: torch.cuda.Event | None


class Attempt:
    """Shared by the streams of one evaluation of the model; used by one thread.

    log       of the run; sites at fault are switched off in it.
    save      gives what puts back all that sparse calls measure for later ones to how it is now.
    strict    a result that is not finite is an error.
    can_redo  the caller makes the evaluation again when `end` says so; else every call looks at its own result.
    """

    def __init__(self, log: RunLog, save: Callable[[], Callable[[], None]], strict: bool, can_redo: bool) -> None:
        self.log = log
        self.strict = strict
        self.can_redo = can_redo
        self._save = save
        self.counts = Counts()
        self._new_sparse_sites: set[Site] = set()
        self._results: list[_Result] = []
        self._at_fault: list[Site | None] = []
        self._flags: dict[torch.device, list[Flag]] = {}
        self._restore: Callable[[], None] | None = None

    def count(self, kind: str, reason: str) -> None:
        """As `RunLog.count`; taken back if the attempt fails."""
        self.counts.add(kind, reason)
        self.log.count(kind, reason)

    def decline(self, reason: str) -> None:
        """Count a call that is not PARO's."""
        self.count("passed", reason)

    def count_sparse(self, site: Site) -> None:
        """A call of the site was sparse."""
        with self.log.lock:
            self.counts.sparse += 1
            self.log.counts.sparse += 1
            if site not in self.log.sparse_sites:
                self._new_sparse_sites.add(site)
                self.log.sparse_sites.add(site)

    def flag(self, device: torch.device) -> Flag:
        """A flag for one result. Many are made at once."""
        free = self._flags.setdefault(device, [])
        if not free:
            flags = torch.zeros(FLAGS_AT_ONCE, 4, dtype=torch.int32, device=device)
            free.extend(map(Flag, flags.unbind(), _like_on_host(flags).unbind()))
        return free.pop()

    def finite(self, site: Site | None, flag: Flag) -> bool:
        """Whether the result whose kernels had this flag is finite; True also where that is seen later."""
        if not self.can_redo:
            return not flag.on_device[0]
        there = None
        if flag.on_device.is_cuda:
            # The copy and the event are queued before what the model launches next: only the attention is waited for.
            flag.on_host.copy_(flag.on_device, non_blocking=True)
            there = torch.cuda.current_stream(flag.on_device.device).record_event()
        self._results.append(_Result(site, flag.on_host, there))
        return True

    def save_once(self) -> None:
        """Sparse calls may measure something for later ones: nothing of it stays if the attempt fails."""
        if self.can_redo and self._restore is None:
            self._restore = self._save()

    def sound(self) -> bool:
        """Whether every result so far is finite; waits for those that nobody has looked at."""
        results, self._results = self._results, []
        for result in results:
            if result.there is not None:
                result.there.synchronize()
            if result.flag[0]:
                self._at_fault.append(result.site)
        return not self._at_fault

    def end(self, number: int = 0) -> bool:
        """The evaluation is over. True: a result was not finite, and the evaluation must be made again; the sites at
        fault are dense by then.

        The first time, number 0, only the first such site is at fault, since what is not finite spreads to all that
        follow; later it is all of them.
        """
        if self.sound():
            return False
        at_fault, self._at_fault = self._at_fault, []
        reasons = {site: not_finite(site) for site in (at_fault if number else at_fault[:1])}
        if self.strict:
            raise FloatingPointError(next(iter(reasons.values())))
        if self._restore is not None:
            self._restore()
        with self.log.lock:
            self.log.counts.take_back(self.counts)
            self.log.sparse_sites -= self._new_sparse_sites
        for site, reason in reasons.items():
            if site is None:
                # Dense steps then run on the host's attention.
                self.log.dense_off = True
                self.log.count("fallbacks", reason)
            else:
                self.log.off_sites[site] = reason
        return True


def _like_on_host(flags: torch.Tensor) -> torch.Tensor:
    return pinned_like(flags).zero_() if flags.is_cuda else flags


def not_finite(site: Site | None) -> str:
    """The reason to show."""
    return f"{site.name if site else 'dense attention'}: the result is not finite"
