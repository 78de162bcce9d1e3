"""One sentence about a run, the same on the node, in the report and on the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..compiling.readiness import COMPILING
from .reasons import LINE, NO_CALL, not_used, with_reason, words_of
from .sentences import clipped, joined, say

if TYPE_CHECKING:
    from .report import Report

COMPILED = "Kernels were being compiled in this run, once on this machine: the next run is faster"
SHORT = "every block kept"


def verdict(report: Report) -> str:
    """What the run came to, and, where it gained nothing, why and what to do."""
    facts = report.facts
    if facts.calibrating:
        steps = steps_text(facts.steps)
        return say("Calibration: {steps} watched or dense, none is meant to be faster", steps=steps)
    if not report.sites:
        return not_used(most_common(report.passed + report.fallbacks) or NO_CALL)
    if not facts.sparse_steps:
        return _no_gain(report)
    said = _gain(report)
    if not report.fallbacks:
        return said
    calls = sum(count for _, count in report.fallbacks)
    counted = say("{count} call", count=calls) if calls == 1 else say("{count} calls", count=calls)
    said = say("{verdict}; {calls} fell back", verdict=said, calls=counted)
    reason = clipped(words_of(most_common(report.fallbacks)), max(40, LINE - len(said) - 2))
    return say("{verdict}: {reason}", verdict=said, reason=reason)


def status(report: Report) -> str:
    """The verdict, and as many details behind it as one line holds."""
    facts, line = report.facts, verdict(report)
    details = [report.family]
    if report.tokens:
        details.append(say("{tokens:,} tokens", tokens=report.tokens))
    if facts.sparse_steps:
        if facts.density is not None:
            kept = say("{density} of blocks kept", density=share(facts.density))
            if facts.raised_from is not None:
                kept = say("{kept}, raised from {density}", kept=kept, density=share(facts.raised_from))
            details.append(kept)
        details.append(report.precision)
    for detail in details:
        if len(line) + len(detail) + 3 > LINE:
            break
        line = joined(" · ", (line, detail))
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
    dense = say("the only step was dense")
    if facts.steps != 1:
        dense = say("all {steps} steps were dense", steps=facts.steps)
    if facts.steps < report.steps:
        dense = say("PARO saw {seen} of {steps} steps, none sparse", seen=facts.steps, steps=report.steps)
    if facts.scheduled:
        if facts.part:
            return say(
                "No gain: {dense}, {part}; nothing to do if another sampler goes on", dense=dense, part=facts.part
            )
        return say("No gain: {dense}; lower dense_steps in PARO Settings", dense=dense)
    if COMPILING in report.calls:
        return say("{compiled} (no step was sparse)", compiled=COMPILED)
    reason = why_dense(report)
    # Short grids keep every block in PARO's own precision, or by the fastest dense attention there is.
    little = reason.startswith(SHORT)
    gain = say("Little gain: {dense}", dense=dense) if little else say("No gain: {dense}", dense=dense)
    return with_reason(gain, reason)


def why_dense(report: Report) -> str:
    """The reason of most calls that were not sparse; of calls that were PARO's, if there is one."""
    ours = [(reason, count) for reason, count in report.calls.items() if reason not in ("sparse", "dense step")]
    return most_common(ours + report.fallbacks) or most_common(report.passed) or "dense step"


def _gain(report: Report) -> str:
    """Of a run with sparse steps, without the calls that fell back."""
    facts = report.facts
    steps = say("{sparse} of {steps} sparse", sparse=facts.sparse_steps, steps=steps_text(facts.steps))
    sparse = steps
    if report.attention_error:
        sparse = say("{sparse}, attention error {error}", sparse=steps, error=share(report.attention_error[0]))
    if report.backend == "reference":
        right = say("{sparse}: right but not faster, by the PyTorch reference", sparse=sparse)
        if report.device == "cpu":
            return say("{right} on the CPU", right=right)
        return say("{right} on {device}; set backend to auto", right=right, device=report.device)
    if COMPILING in report.calls:
        return say("{compiled} ({sparse})", compiled=COMPILED, sparse=steps)
    gain = compared_gain(report)
    if gain is None:
        return _expected(report, sparse)
    first = facts.timing["dense"].first
    if round(gain, 1) > 1:
        if first:
            return say("{gain:.1f}x faster per step than the first, dense one: {sparse}", gain=gain, sparse=sparse)
        return say("{gain:.1f}x faster per step: {sparse}", gain=gain, sparse=sparse)
    dense = say("the first, dense step") if first else say("dense ones")
    return say(
        "No gain per step: sparse steps took {rate:.2f}x the time of {dense}, {sparse}",
        rate=1 / gain,
        dense=dense,
        sparse=sparse,
    )


def compared_gain(report: Report) -> float | None:
    """Sparse steps against the run's own dense ones, where that tells something: with PARO's kernels, compiled."""
    usable = report.backend == "triton" and COMPILING not in report.calls
    return report.facts.gain if usable else None


def _expected(report: Report, sparse: str) -> str:
    if report.expected_gain is None:
        return sparse
    low, high = (f"{gain:.1f}x" for gain in report.expected_gain)
    if low == high:
        return say("{sparse}, expected about {gain} per step", sparse=sparse, gain=low)
    return say("{sparse}, expected {low} to {high} per step", sparse=sparse, low=low, high=high)


def steps_text(steps: int) -> str:
    """`1 step`, `20 steps`."""
    return say("{count} step", count=steps) if steps == 1 else say("{count} steps", count=steps)


def share(value: float) -> str:
    """A share in percent, with a decimal where that matters."""
    if 0 < value < 0.0005:
        return say("under 0.1 %")
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def exact(value: float) -> str:
    """A share in percent, always with a decimal."""
    return f"{100 * value:.1f} %"


def range_of(groups: Sequence[tuple[float, int]]) -> str:
    """` (41 % to 20 %)`: the densities of the first and the last sparse steps; nothing where all are alike."""
    first, last = (share(groups[place][0]) for place in (0, -1)) if groups else ("", "")
    return say(" ({first} to {last})", first=first, last=last) if first != last else ""
