"""One sentence about a run, the same on the node, in the report and on the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..compiling.readiness import COMPILING
from .reasons import LINE, NO_CALL, clipped, not_used, with_reason, words_of

if TYPE_CHECKING:
    from .report import Report

COMPILED = "Kernels were being compiled in this run, once on this machine: the next run is faster"
SHORT = "every block kept"


def verdict(report: Report) -> str:
    """What the run came to, and, where it gained nothing, why and what to do."""
    facts = report.facts
    if facts.calibrating:
        return f"Calibration: {steps_text(facts.steps)} watched or dense, none is meant to be faster"
    if not report.sites:
        return not_used(most_common(report.passed + report.fallbacks) or NO_CALL)
    if not facts.sparse_steps:
        return _no_gain(report)
    said = _gain(report)
    if not report.fallbacks:
        return said
    calls = sum(count for _, count in report.fallbacks)
    said += f"; {calls} call{'s' * (calls != 1)} fell back"
    return f"{said}: {clipped(words_of(most_common(report.fallbacks)), max(40, LINE - len(said) - 2))}"


def status(report: Report) -> str:
    """The verdict, and as many details behind it as one line holds."""
    facts, line = report.facts, verdict(report)
    details = [report.family]
    if report.tokens:
        details.append(f"{report.tokens:,} tokens")
    if facts.sparse_steps:
        if facts.density is not None:
            raised = "" if facts.raised_from is None else f", raised from {share(facts.raised_from)}"
            details.append(f"{share(facts.density)} of blocks kept{raised}")
        details.append(report.precision)
    for detail in details:
        if len(line) + len(detail) + 3 > LINE:
            break
        line += f" · {detail}"
    return line


def most_common(counts: list[tuple[str, int]]) -> str | None:
    """Of (reason, count) the reason that came most often, whatever layer it was about; None of none."""
    total: Counter = Counter()
    for reason, count in counts:
        total[words_of(reason)] += count
    if not total:
        return None
    words = total.most_common(1)[0][0]
    return max((count, reason) for reason, count in counts if words_of(reason) == words)[1]


def _no_gain(report: Report) -> str:
    """Of a run that met attention layers, none of which was sparse."""
    facts = report.facts
    dense = "the only step was dense" if facts.steps == 1 else f"all {facts.steps} steps were dense"
    if facts.steps < report.steps:
        dense = f"PARO saw {facts.steps} of {report.steps} steps, none sparse"
    if facts.scheduled:
        if facts.part:
            return f"No gain: {dense}, {facts.part}; nothing to do if another sampler goes on"
        return f"No gain: {dense}; lower dense_steps in PARO Settings"
    if COMPILING in report.calls:
        return f"{COMPILED} (no step was sparse)"
    reason = why_dense(report)
    # Short grids keep every block in PARO's own precision, or by the fastest dense attention there is.
    return with_reason(f"{'Little' if reason.startswith(SHORT) else 'No'} gain: {dense}", reason)


def why_dense(report: Report) -> str:
    """The reason of most calls that were not sparse; of calls that were PARO's, if there is one."""
    ours = [(reason, count) for reason, count in report.calls.items() if reason not in ("sparse", "dense step")]
    return most_common(ours + report.fallbacks) or most_common(report.passed) or "dense step"


def _gain(report: Report) -> str:
    """Of a run with sparse steps, without the calls that fell back."""
    facts = report.facts
    sparse = f"{facts.sparse_steps} of {steps_text(facts.steps)} sparse"
    error = f", attention error {share(report.attention_error[0])}" if report.attention_error else ""
    if report.backend == "reference":
        where = "on the CPU" if report.device == "cpu" else f"on {report.device}; set backend to auto"
        return f"{sparse}{error}: right but not faster, by the PyTorch reference {where}"
    if COMPILING in report.calls:
        return f"{COMPILED} ({sparse})"
    gain = compared_gain(report)
    if gain is None:
        return f"{sparse}{error}{_expected(report)}"
    first = facts.timing["dense"].first
    if round(gain, 1) > 1:
        return f"{gain:.1f}x faster per step{' than the first, dense one' * first}: {sparse}{error}"
    dense = "the first, dense step" if first else "dense ones"
    return f"No gain per step: sparse steps took {1 / gain:.2f}x the time of {dense}, {sparse}{error}"


def compared_gain(report: Report) -> float | None:
    """Sparse steps against the run's own dense ones, where that tells something: with PARO's kernels, compiled."""
    usable = report.backend == "triton" and COMPILING not in report.calls
    return report.facts.gain if usable else None


def _expected(report: Report) -> str:
    if report.expected_gain is None:
        return ""
    low, high = (f"{gain:.1f}x" for gain in report.expected_gain)
    return f", expected about {low} per step" if low == high else f", expected {low} to {high} per step"


def steps_text(steps: int) -> str:
    """`1 step`, `20 steps`."""
    return f"{steps} step{'s' * (steps != 1)}"


def share(value: float) -> str:
    """A share in percent, with a decimal where that matters."""
    if 0 < value < 0.0005:
        return "under 0.1 %"
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def exact(value: float) -> str:
    """A share in percent, always with a decimal."""
    return f"{100 * value:.1f} %"


def range_of(groups: Sequence[tuple[float, int]]) -> str:
    """` (41 % to 20 %)`: the densities of the first and the last sparse steps; nothing where all are alike."""
    first, last = (share(groups[place][0]) for place in (0, -1)) if groups else ("", "")
    return f" ({first} to {last})" if first != last else ""
