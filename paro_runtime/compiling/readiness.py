"""Whether the kernels that a run needs are compiled and right, asked at the first call of every step.

On a machine that has not compiled them yet, a run begins on the host's attention and goes over to PARO's at the first
step that finds them ready (`ahead`).
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from functools import partial

import torch

from ...kernels.attention.gluon_sm90 import launch as gluon_launch
from ...kernels.core.dispatch import capability_of_gpu
from ...kernels.core.layout import TokenLayout
from ..plan.options import MaskOptions, query_block
from .ahead import SWITCH, Ahead, ahead_of
from .rehearsal import Job
from .self_check import self_check

log = logging.getLogger("paro")
COMPILING = "kernels are being compiled, once on this machine"


@dataclass
class _Kind:
    """Calls of one kind. step: the one that was decided last; reason: of that step, or for good if checked."""

    ahead: Ahead | None
    step: int = -1
    reason: str | None = None
    checked: bool = False
    checked_special: bool = False


class Readiness:
    """The kernels of one run. Safe to call from several threads."""

    def __init__(self, options: MaskOptions, compile_ahead: bool) -> None:
        """compile_ahead: False compiles each kernel when it is first called, and the run waits for that."""
        self._options = options
        self._compile_ahead = compile_ahead
        self._kinds: dict[tuple, _Kind] = {}
        self._lock = threading.Lock()

    def reason(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        step: int,
        *,
        biased: bool,
        precision: str,
        backend: str,
    ) -> str | None:
        """Why calls like this cannot be PARO's in this step, or None: COMPILING, or what the self-check found.

        q `[B, Hq, L, D]`, k `[B, Hkv, L, D]`. biased: with a bias per key.
        """
        key = (layout, q.shape, k.shape[1], q.dtype, q.device, biased, precision, backend)
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None:
                kind = self._kinds[key] = _Kind(self._start(q, k, layout, biased, precision, backend))
            if kind.step != step:
                kind.step = step
                if not kind.checked or not kind.checked_special:
                    kind.reason = self._decide(kind, q, layout, precision, backend)
            return kind.reason

    @property
    def late_ready(self) -> bool:
        """Whether kernels that have a stand-in may be used too."""
        with self._lock:
            return all(kind.checked_special for kind in self._kinds.values())

    def _start(self, q, k, layout: TokenLayout, biased: bool, precision: str, backend: str) -> Ahead | None:
        capability = capability_of_gpu(q.device) if backend == "triton" else None
        if capability is None or not self._compile_ahead or os.environ.get(SWITCH) == "0":
            return None
        dtype, group = str(q.dtype).removeprefix("torch."), q.shape[1] // k.shape[1]
        job = Job(
            capability, dtype, q.shape[3], group, q.shape[0], layout.prefix, layout.grid, layout.suffix, biased,
            precision, self._options.order, self._options.pool,
        )  # fmt: skip
        try:
            return ahead_of(job)
        except OSError as error:  # no process to be had, or no place to write: kernels are compiled as they come
            log.warning("PARO: kernels are not compiled ahead (%s: %s)", type(error).__name__, error)
            return None

    def _decide(self, kind: _Kind, q, layout, precision, backend) -> str | None:
        if kind.ahead is not None and not kind.ahead.ready():
            return COMPILING
        block_q, pool = query_block(layout.grid_tokens), self._options.pool
        check = partial(self_check, q.device, q.dtype, q.shape[3], precision, backend, block_q=block_q, pool=pool)
        found = check()
        kind.checked = True
        late = kind.ahead is None or kind.ahead.late_ready()
        gluon_launch.hold(not late)
        if late and backend == "triton" and found is None:
            wrong = check(special=True)
            if wrong is not None:
                gluon_launch.forbid(wrong)
        kind.checked_special = late
        return found
