"""What happened in one run: counts by reason, notes, sites, seconds. The report is made of it."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from ..plan.plan import Site
from .schedule import StepClock

log = logging.getLogger("paro")


@dataclass
class Counts:
    """What happened to attention calls, by reason."""

    sparse: int = 0
    dense: Counter = field(default_factory=Counter)
    passed: Counter = field(default_factory=Counter)
    fallbacks: Counter = field(default_factory=Counter)

    def add(self, kind: str, reason: str) -> None:
        """One more call; kind is the name of a field."""
        getattr(self, kind)[reason] += 1

    def take_over(self, others: Counts) -> None:
        """As if these had been counted here."""
        self.sparse += others.sparse
        self.dense += others.dense
        self.passed += others.passed
        self.fallbacks += others.fallbacks

    def take_back(self, others: Counts) -> None:
        """As if these had not been counted."""
        self.sparse -= others.sparse
        self.dense -= others.dense
        self.passed -= others.passed
        self.fallbacks -= others.fallbacks


@dataclass
class Seconds:
    """Wall-clock seconds of PARO's own work. tail: masks and biases that the run measures itself."""

    calibration: float = 0.0
    tail: float = 0.0


class RunLog:
    """Safe to call from several threads.

    precision: `auto` until the device is known. sites: all that were met; routed_sites: whose masks the run measured
    itself; off_sites: that are dense for the rest of the run, with the reason. dense_off: no dense call is PARO's any
    more. verbose: every fallback goes to the console, not only the first with a reason.
    """

    def __init__(self, precision: str, verbose: bool = False) -> None:
        self.precision = precision
        self.backend = ""
        self.device = ""
        self.counts = Counts()
        self.notes: list[str] = []
        self.seconds = Seconds()
        self.clock = StepClock()
        self.sites: set[Site] = set()
        self.sparse_sites: set[Site] = set()
        self.dense_block_sites: set[Site] = set()
        self.routed_sites: set[Site] = set()
        self.off_sites: dict[Site, str] = {}
        self.dense_off = False
        self.lock = threading.RLock()
        self._verbose = verbose
        self._logged: set[str] = set()

    def count(self, kind: str, reason: str) -> None:
        """One more call or evaluation; kind is the name of a field of `Counts`."""
        with self.lock:
            self.counts.add(kind, reason)
            first = self._is_first(reason)
        if kind == "fallbacks" and (first or self._verbose):
            log.warning("%s", reason)
        elif kind == "passed" and (first or self._verbose):
            log.debug("%s", reason)

    def log_once(self, where: str, error: Exception) -> None:
        """The traceback of an error that nobody foresaw, once in a run for each kind."""
        with self.lock:
            first = self._is_first(f"{where} {type(error).__name__}")
        if first:
            log.error("%s went wrong; the host's attention goes on", where, exc_info=error)

    def _is_first(self, text: str) -> bool:
        first = text not in self._logged
        self._logged.add(text)
        return first

    def note(self, text: str) -> None:
        """Tell the user something about the run as a whole, once."""
        if text not in self.notes:
            self.notes.append(text)
            log.warning("%s", text)

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Add the seconds spent within, whether or not that fails; work is the name of a field of `Seconds`."""
        began = perf_counter()
        try:
            yield
        finally:
            with self.lock:
                setattr(self.seconds, work, getattr(self.seconds, work) + perf_counter() - began)

    def absorb(self, other: RunLog) -> None:
        """Count what a run of the same model, on another device and over by now, did as this one's."""
        with self.lock:
            self.counts.take_over(other.counts)
            self.sites |= other.sites
            self.sparse_sites |= other.sparse_sites
            self.dense_block_sites |= other.dense_block_sites
            self.routed_sites |= other.routed_sites
            self.notes += [note for note in other.notes if note not in self.notes]
