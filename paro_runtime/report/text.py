"""A report's lines for people: the verdict, then the facts behind it in groups, each only where it happened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...kernels.core.precision import PRECISIONS
from ..plan.plan import IN_PASSING
from .reasons import hint_of, plain, without_layer, words_of
from .sentences import Sentence, joined, listed, say
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


def report_text(report: Report) -> Sentence:
    """Several lines."""
    groups = {
        say("What ran"): _ran(report),
        say("How exact"): _exact(report),
        say("Plan"): _plan(report),
        say("Time"): _time(report),
        say("Reasons"): _reasons(report),
        say("Notes"): map(plain, report.notes),
    }
    return in_groups(verdict(report), groups)


def in_groups(first: str, groups: Mapping[Any, Iterable[str]]) -> Sentence:
    """A sentence, then the lines of each group under its title; groups without lines are left out."""
    lines = [first]
    for title, found in groups.items():
        items = [joined("", ("- ", line)) for line in found]
        if items:
            lines += ["", title, *items]
    return joined("\n", lines)


def _ran(report: Report) -> Iterable[str]:
    facts = report.facts
    if report.tokens:
        tokens = {"family": report.family, "count": report.tokens, "tokens": _tokens(report)}
        yield say("{family}, {count:,} tokens: {tokens}", **tokens)
    else:
        yield say("{family}, no size that PARO could read", family=report.family)
    for other in facts.others:
        yield say("another size in this run: {size} tokens", size=other)
    if facts.steps:
        counts = {"sparse": facts.sparse_steps, "dense": report.dense_steps}
        steps = say("{sparse} sparse and {dense} dense steps", **counts)
        if facts.steps == 1:
            steps = say("{sparse} sparse and {dense} dense step", **counts)
        if facts.steps < report.steps:
            steps = say("{steps}; of {count} planned, the rest had no part for PARO", steps=steps, count=report.steps)
        yield steps
    if not report.sites:
        return
    if facts.sparse_steps:
        yield say("{sparse} of {all} attention layers sparse", sparse=report.sites_sparse, all=report.sites)
    elif report.sites == 1:
        yield say("{count} attention layer seen, none sparse", count=report.sites)
    else:
        yield say("{count:,} attention layers seen, none sparse", count=report.sites)
    if report.sites_dense_blocks:
        yield say("{count} of them dense because of dense_blocks", count=report.sites_dense_blocks)
    if facts.sparse_steps:
        by_reference = say("the PyTorch reference: right, but not faster than dense attention")
        yield say(
            "{kernels}, on {device}, precision {precision}",
            kernels=by_reference if report.backend == "reference" else say("Triton kernels"),
            device=report.device,
            precision=report.precision,
        )


def _tokens(report: Report) -> Sentence:
    tokens = say("{grid} of the picture (frames, height, width)", grid=" x ".join(map(str, report.grid)))
    counts = {"tokens": tokens, "before": report.prefix, "behind": report.suffix}
    if report.prefix and report.suffix:
        return say("{tokens}, {before:,} before and {behind:,} behind it (text or references)", **counts)
    if report.prefix:
        return say("{tokens}, {before:,} before it (text or references)", tokens=tokens, before=report.prefix)
    if report.suffix:
        return say("{tokens}, {behind:,} behind it (text or references)", tokens=tokens, behind=report.suffix)
    return tokens


def error_text(report: Report) -> str:
    """How exact the attention was, in one line."""
    if report.attention_error is None:
        return say("attention error: not measured in this run")
    whole, worst = report.attention_error
    return say(
        "attention error {whole}, in the worst layer {worst} "
        "(against exact attention, relative L2, on a sample of the rows)",
        whole=exact(whole),
        worst=exact(worst),
    )


def _exact(report: Report) -> Iterable[str]:
    facts = report.facts
    if not facts.sparse_steps:
        return
    yield error_text(report)
    if facts.density is not None:
        yield _density(report)
        if facts.raised_from is not None:
            before = exact(facts.raised_from)
            yield say("density raised from {density} to hold quality on so small a grid", density=before)
        # Of a moved plan nobody knows what they hold on this grid.
        if report.plan is None or "moved_from" not in report.plan.made:
            yield _held(report)
    if report.sites_routed:
        yield say(
            "{count} of {sparse} attention layers choose their blocks from this run's own picture",
            count=report.sites_routed,
            sparse=report.sites_sparse,
        )
    rotatable = report.precision in PRECISIONS and PRECISIONS[report.precision].rotated is not None
    if report.sites_rotated and rotatable:
        yield say(
            "{count} of {all} attention layers marked for spreading large values before they are rounded to INT8",
            count=report.sites_rotated,
            all=report.sites,
        )


def _density(report: Report) -> Sentence:
    facts = report.facts
    groups = listed(
        say("{density} in {steps}", density=exact(density), steps=steps_text(count)) for density, count in facts.groups
    )
    kept = {"density": exact(facts.density), "groups": groups}
    if facts.others:
        return say("{density} of the blocks of the largest size kept on average: {groups}", **kept)
    return say("{density} of the blocks kept on average: {groups}", **kept)


def _held(report: Report) -> Sentence:
    held = say("the plan's blocks hold {share} of the attention", share=exact(report.mass_kept))
    target = report.plan.settings.get("mass_target", 0) if report.plan else 0
    if report.mass_kept >= target:
        return held
    return say("{held} ({target} were wanted, the density allows no more)", held=held, target=exact(target))


def _plan(report: Report) -> Iterable[str]:
    plan = report.plan
    if plan is None:
        if report.sites and not report.facts.calibrating:
            yield say("no plan")
        return
    source = SOURCES.get(report.plan_source, report.plan_source or say("not known"))
    moved = plan.made.get("moved_from")
    step = plan.made.get("step") if report.plan_source == IN_PASSING else None
    if isinstance(step, int):
        source = say("{source}, of what step {step} showed", source=source, step=step + 1)
    if moved:
        source = say("{source}, moved here from a grid of {grid}", source=source, grid=moved.replace("x", " x "))
    yield source
    if report.orders_histogram:
        heads = listed(_heads(order, count) for order, count in report.orders_histogram.items())
        yield say("token orders: {heads}", heads=heads)


def _heads(order: str, count: int) -> Sentence:
    if count == 1:
        return say("{count} head {order}", count=count, order=order)
    return say("{count:,} heads {order}", count=count, order=order)


def _time(report: Report) -> Iterable[str]:
    facts = report.facts
    for kind, timing in facts.timing.items():
        took = say("a {kind} step took {seconds:.2f} s", kind=kind, seconds=timing.seconds)
        if timing.steps > 1:
            took = say("{took} (median of {steps})", took=took, steps=timing.steps)
        if timing.first and kind == "dense":
            took = say("{took}, the run's first, which may also load things", took=took)
        yield took
    gain = compared_gain(report)
    if gain is not None:
        yield say(
            "measured: sparse steps {gain:.2f}x as fast as this run's own dense steps; not the whole run's gain",
            gain=gain,
        )
    if report.expected_gain is not None and facts.sparse_steps:
        low, high = report.expected_gain
        yield say(
            "expected: sparse steps {low:.2f}x to {high:.2f}x as fast as dense ones, by the number of tokens alone",
            low=low,
            high=high,
        )
    if report.calibration_seconds:
        took = say("making the plan took {seconds:.2f} s", seconds=report.calibration_seconds)
        watched = report.step_seconds.get("calibrating")
        if watched is not None:
            took = say("{took}; a step in which that was done took {seconds:.2f} s", took=took, seconds=watched)
        yield took
    if report.tail_seconds:
        yield say("measuring what dropped blocks hold took {seconds:.2f} s", seconds=report.tail_seconds)


def _reasons(report: Report) -> Iterable[str]:
    """Calls by what became of them; what to do is said where something is amiss."""
    calls = dict(report.calls)
    sparse = calls.pop("sparse", 0)
    if sparse:
        yield say("{calls} sparse", calls=_calls(sparse))
    for reason, count in calls.items():
        dense = say("{calls} dense: {reason}", calls=_calls(count), reason=words_of(reason))
        yield dense if report.facts.sparse_steps else say("{line}; {hint}", line=dense, hint=hint_of(reason))
    for number, reasons in _grouped(report.fallbacks):
        yield say("{calls} fell back to ComfyUI's attention: {reasons}", calls=number, reasons=reasons)
    for number, reasons in _grouped(report.passed):
        yield say("{calls} left to ComfyUI: {reasons}", calls=number, reasons=reasons)


def _grouped(counts: list[tuple[str, int]]) -> Iterable[tuple[Sentence, Sentence]]:
    """For each reason how many calls, and the reason with the layers it was about and what to do."""
    found: dict[str, list[tuple[str, int]]] = {}
    for reason, count in counts:
        found.setdefault(words_of(reason), []).append((reason, count))
    for words, each in found.items():
        layers = list(dict.fromkeys(layer for reason, _ in each if (layer := without_layer(reason)[1])))
        named = listed(layers[:NAMED_LAYERS])
        if len(layers) > NAMED_LAYERS:
            named = say("{layers} and {count} more", layers=named, count=len(layers) - NAMED_LAYERS)
        about = say("{reason} ({layers})", reason=words, layers=named) if layers else words
        yield _calls(sum(count for _, count in each)), say("{line}; {hint}", line=about, hint=hint_of(each[0][0]))


def _calls(count: int) -> Sentence:
    return say("{count} call", count=count) if count == 1 else say("{count:,} calls", count=count)
