"""A report's lines for people: the verdict, then the facts behind it in groups, each only where it happened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...kernels.core.precision import PRECISIONS
from ..plan.plan import IN_PASSING
from .reasons import hint_of, plain, without_layer, words_of
from .verdict import compared_gain, exact, steps_text, verdict

if TYPE_CHECKING:
    from .report import Report

NAMED_LAYERS = 8
SOURCES = {
    IN_PASSING: "made in this run",
    "plan found": "found in models/paro, made for this model and size",
    "given plan": "the one that was given",
    "given plan, moved to this grid": "the one that was given",
}
GROUPS = ("What ran", "How exact", "Plan", "Time", "Reasons", "Notes")


def report_text(report: Report) -> str:
    """Several lines."""
    facts = (_ran, _exact, _plan, _time, _reasons, lambda its: map(plain, its.notes))
    lines = [verdict(report)]
    for title, tell in zip(GROUPS, facts, strict=True):
        found = list(tell(report))
        if found:
            lines += ["", title, *(f"- {line}" for line in found)]
    return "\n".join(lines)


def _ran(report: Report) -> Iterable[str]:
    facts = report.facts
    if report.tokens:
        yield f"{report.family}, {report.tokens:,} tokens: {_tokens(report)}"
    else:
        yield f"{report.family}, no size that PARO could read"
    for other in facts.others:
        yield f"another size in this run: {other} tokens"
    if facts.steps:
        missing = f"; of {report.steps} planned, the rest had no part for PARO" * (facts.steps < report.steps)
        yield f"{facts.sparse_steps} sparse and {report.dense_steps} dense {_plural('step', facts.steps)}{missing}"
    if not report.sites:
        return
    if facts.sparse_steps:
        yield f"{report.sites_sparse} of {report.sites} attention layers sparse"
    else:
        yield f"{_plural('attention layer', report.sites, True)} seen, none sparse"
    if report.sites_dense_blocks:
        yield f"{report.sites_dense_blocks} of them dense because of dense_blocks"
    kernels = {"reference": "the PyTorch reference: right, but not faster than dense attention"}
    if facts.sparse_steps:
        yield f"{kernels.get(report.backend, 'Triton kernels')}, on {report.device}, precision {report.precision}"


def _tokens(report: Report) -> str:
    frames = f"{' x '.join(map(str, report.grid))} of the picture (frames, height, width)"
    beside = [f"{count:,} {where}" for count, where in ((report.prefix, "before"), (report.suffix, "behind")) if count]
    return frames + (f", {' and '.join(beside)} it (text or references)" if beside else "")


def error_text(report: Report) -> str:
    """How exact the attention was, in one line."""
    if report.attention_error is None:
        return "attention error: not measured in this run"
    whole, worst = report.attention_error
    where = "(against exact attention, relative L2, on a sample of the rows)"
    return f"attention error {exact(whole)}, in the worst layer {exact(worst)} {where}"


def _exact(report: Report) -> Iterable[str]:
    facts = report.facts
    if not facts.sparse_steps:
        return
    yield error_text(report)
    if facts.density is not None:
        each = ", ".join(f"{exact(density)} in {steps_text(count)}" for density, count in facts.groups)
        about = " of the largest size" * bool(facts.others)
        yield f"{exact(facts.density)} of the blocks{about} kept on average: {each}"
        if facts.raised_from is not None:
            yield f"density raised from {exact(facts.raised_from)} to hold quality on so small a grid"
        # Of a moved plan nobody knows what they hold on this grid.
        if report.plan is None or "moved_from" not in report.plan.made:
            yield f"the plan's blocks hold {exact(report.mass_kept)} of the attention{_missed(report)}"
    if report.sites_routed:
        yield (
            f"{report.sites_routed} of {report.sites_sparse} attention layers "
            "choose their blocks from this run's own picture"
        )
    rotatable = report.precision in PRECISIONS and PRECISIONS[report.precision].rotated is not None
    if report.sites_rotated and rotatable:
        yield (
            f"{report.sites_rotated} of {report.sites} attention layers "
            "marked for spreading large values before they are rounded to INT8"
        )


def _missed(report: Report) -> str:
    target = report.plan.settings.get("mass_target", 0) if report.plan else 0
    if report.mass_kept >= target:
        return ""
    return f" ({exact(target)} were wanted, the density allows no more)"


def _plan(report: Report) -> Iterable[str]:
    plan = report.plan
    if plan is None:
        if report.sites and not report.facts.calibrating:
            yield "no plan"
        return
    source = SOURCES.get(report.plan_source, report.plan_source or "not known")
    moved = plan.made.get("moved_from")
    step = plan.made.get("step") if report.plan_source == IN_PASSING else None
    where = "" if not isinstance(step, int) else f", of what step {step + 1} showed"
    yield source + where + (f", moved here from a grid of {moved.replace('x', ' x ')}" if moved else "")
    if report.orders_histogram:
        orders = ", ".join(f"{_plural('head', count, True)} {name}" for name, count in report.orders_histogram.items())
        yield f"token orders: {orders}"


def _time(report: Report) -> Iterable[str]:
    facts = report.facts
    for kind, timing in facts.timing.items():
        median = f" (median of {timing.steps})" if timing.steps > 1 else ""
        first = ", the run's first, which may also load things" if timing.first and kind == "dense" else ""
        yield f"a {kind} step took {timing.seconds:.2f} s{median}{first}"
    gain = compared_gain(report)
    if gain is not None:
        yield f"measured: sparse steps {gain:.2f}x as fast as this run's own dense steps; not the whole run's gain"
    if report.expected_gain is not None and facts.sparse_steps:
        low, high = report.expected_gain
        yield f"expected: sparse steps {low:.2f}x to {high:.2f}x as fast as dense ones, by the number of tokens alone"
    if report.calibration_seconds:
        watched = report.step_seconds.get("calibrating")
        step = "" if watched is None else f"; a step in which that was done took {watched:.2f} s"
        yield f"making the plan took {report.calibration_seconds:.2f} s{step}"
    if report.tail_seconds:
        yield f"measuring what dropped blocks hold took {report.tail_seconds:.2f} s"


def _reasons(report: Report) -> Iterable[str]:
    """Calls by what became of them; what to do is said where something is amiss."""
    calls = dict(report.calls)
    sparse = calls.pop("sparse", 0)
    if sparse:
        yield f"{_plural('call', sparse, True)} sparse"
    for reason, count in calls.items():
        hint = "" if report.facts.sparse_steps else f"; {hint_of(reason)}"
        yield f"{_plural('call', count, True)} dense: {words_of(reason)}{hint}"
    yield from _grouped(report.fallbacks, "fell back to ComfyUI's attention")
    yield from _grouped(report.passed, "left to ComfyUI")


def _grouped(counts: list[tuple[str, int]], what: str) -> Iterable[str]:
    """One line for each reason, with the layers it was about."""
    found: dict[str, list[tuple[str, int]]] = {}
    for reason, count in counts:
        found.setdefault(words_of(reason), []).append((reason, count))
    for words, each in found.items():
        layers = list(dict.fromkeys(layer for reason, _ in each if (layer := without_layer(reason)[1])))
        more = f" and {len(layers) - NAMED_LAYERS} more" if len(layers) > NAMED_LAYERS else ""
        about = f" ({', '.join(layers[:NAMED_LAYERS])}{more})" if layers else ""
        calls = _plural("call", sum(count for _, count in each), True)
        yield f"{calls} {what}: {words}{about}; {hint_of(each[0][0])}"


def _plural(word: str, count: int, number: bool = False) -> str:
    return f"{f'{count:,} ' if number else ''}{word}{'s' * (count != 1)}"
