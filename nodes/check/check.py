"""A check without sampling: do the kernels run here, what would a run do, and how long does one attention call take?

What takes time is in `check_measure`. Nothing here fails because a machine or a model lacks something: it says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from ...kernels.core.dispatch import resolve
from ...kernels.core.precision import PRECISIONS
from ...kernels.core.support import interpreted
from ...paro_runtime.compiling.readiness import COMPILING, Readiness
from ...paro_runtime.plan.options import MaskOptions
from ...paro_runtime.run.session import Session
from .measure import Row, Size

# Compiling is waited for so long, in seconds: it takes half a minute of one core, once on a machine.
WAIT_SECONDS = 90.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Kernels:
    """Whether PARO's kernels can be used; reason: as `reasons` knows it, empty if they can. seconds: of finding out."""

    ready: bool
    reason: str
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Outlook:
    """What a run would do. dense: of each of its steps, whether it is; densities: of each sparse one; why_not: why no
    call would be sparse. gain: of a sparse step over a dense one, careful and hopeful, by the number of tokens alone.
    sites: attention layers that PARO would take, None where that is not known; part: of which longer schedule."""

    family: str
    title: str
    evidence: str
    density: float
    precision: str
    dense: tuple[bool, ...]
    densities: tuple[float, ...]
    dense_blocks: str
    sites: int | None
    gain: tuple[float, float] | None = None
    part: str = ""
    why_not: str = ""

    @property
    def run_gain(self) -> tuple[float, float] | None:
        """Of a whole run, if every dense step takes as long as without PARO."""
        if self.gain is None or not self.dense:
            return None
        steps, sparse = len(self.dense), len(self.densities)
        least, most = (steps / (steps - sparse + sparse / gain) for gain in self.gain)
        return least, most


@dataclass(frozen=True)
class Check:
    """Everything that was found. others: attention nodes and the like on the model, a line each; notes: what could not
    be found out, a line each."""

    machine: dict
    kernels: Kernels | None = None
    outlook: Outlook | None = None
    size: Size | None = None
    rows: tuple[Row, ...] = ()
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict:
        """JSON-ready: what to send with a question or a result."""
        return {
            "machine": self.machine,
            "kernels": self.kernels and asdict(self.kernels),
            "run": self.outlook and {**asdict(self.outlook), "run_gain": self.outlook.run_gain},
            "call": self.size and self.size.as_dict(),
            "inputs": "random, unit normal",
            "rows": [asdict(row) for row in self.rows],
            "others": list(self.others),
            "notes": list(self.notes),
        }


def check_kernels(
    size: Size, device: torch.device, precision: str, options: MaskOptions, between: Callable[[], None]
) -> Kernels:
    """Compile, if this machine has not, and run the self-check. between: called again and again; may raise, to stop."""
    began = time.perf_counter()
    if device.type != "cuda" and not interpreted():  # whether Triton is there does not matter then
        return Kernels(False, f"triton does not run on {device.type}")
    reason = resolve("triton", device, size.dtype, size.head_dim, PRECISIONS[precision]).reason
    if reason is not None:
        return Kernels(False, reason)
    readiness, step = Readiness(options, compile_ahead=True), 0
    q = torch.empty(1, size.heads, 1, size.head_dim, dtype=size.dtype, device=device)
    while True:
        between()
        reason = readiness.reason(q, q, size.layout, step, biased=False, precision=precision, backend="triton")
        waiting = reason == COMPILING or (reason is None and not readiness.late_ready)
        seconds, step = time.perf_counter() - began, step + 1
        if not waiting or seconds > WAIT_SECONDS:
            break
        time.sleep(POLL_SECONDS)
    if reason == COMPILING:
        note = f"waited for {WAIT_SECONDS:.0f} s; check again in a minute"
        return Kernels(False, reason, seconds, note)
    note = "a faster kernel for this GPU is still being compiled" if waiting and reason is None else ""
    return Kernels(reason is None, reason or "", seconds, note)


def outlook(session: Session, size: Size, device: torch.device, sites: int | None) -> Outlook:
    """What a run with this session's settings and sigmas would do with calls of this size."""
    layout, recipe = size.layout, session.policy.recipe
    session.course.begins_on(layout)
    its, options = session.schedule, session.options_on(layout)
    q = torch.empty(1, size.heads, 1, size.head_dim, dtype=size.dtype, device=device)
    why_not = session.unsuitable_reason(layout.grid_tokens, q)
    why_not = why_not or session.too_short_to_drop(layout.grid_tokens, device) or _by_reference(session, q)
    dense = tuple(its.is_dense_step(step) for step in range(its.steps))
    if why_not is None and all(dense):
        why_not = "dense step"
    plan = session.policy.plan
    groups = tuple(plan.densities) if plan is not None else options.densities(options.density)
    densities = tuple(groups[its.group(step, len(groups))] for step, one in enumerate(dense) if not one)
    density = sum(densities) / len(densities) if densities else 1.0
    part = f"{its.steps} of about {its.whole} steps of a whole schedule" if its.whole > its.steps else ""
    return Outlook(
        family=session.policy.identity.family,
        title=recipe.title,
        evidence=recipe.evidence,
        density=density,
        precision=session.log.precision,
        dense=dense,
        densities=densities,
        dense_blocks=session.settings.dense_blocks or recipe.dense_blocks,
        sites=sites,
        gain=None if why_not else recipe.expected_gain(layout, density),
        part=part,
        why_not=why_not or "",
    )


def _by_reference(session: Session, q: torch.Tensor) -> str | None:
    """Why a run would be computed by the PyTorch reference, which is right but slow, or None."""
    if session.log.backend != "reference":
        return None
    found = resolve("triton", q.device, q.dtype, q.shape[3], PRECISIONS[session.log.precision])
    return found.reason or "the settings ask for the PyTorch reference"
