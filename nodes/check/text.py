"""What a check tells its user: a sentence, then the facts behind it in groups."""

from __future__ import annotations

from collections.abc import Iterable

from ...paro_runtime.report.reasons import hint_of, with_reason, words_of
from ...paro_runtime.report.verdict import range_of, share, steps_text
from .check import Check, Outlook
from .measure import Row

NO_MODEL = "connect a model for what a run would do with it"
STACKING = (
    "PARO Patch Model after the loader, LoRAs and everything that changes the model; another attention node before or "
    "after it, as you like: PARO puts itself first and leaves that node the calls it does not take"
)


def check_text(check: Check) -> str:
    """Several lines."""
    groups = {
        "This machine": _machine(check),
        "What a run would do": _run(check),
        "One attention call": _call(check),
        "Other nodes on the model": _others(check),
        "Notes": check.notes,
    }
    lines = [check_verdict(check)]
    for title, found in groups.items():
        found = list(found)
        if found:
            lines += ["", title, *(f"- {line}" for line in found)]
    return "\n".join(lines)


def check_verdict(check: Check) -> str:
    """One sentence: whether PARO would help here, and if not, what to do."""
    kernels, run = check.kernels, check.outlook
    if kernels is None:
        return "Not all could be checked: see the last lines"
    if not kernels.ready:
        return with_reason("PARO cannot be used now", kernels.reason, kernels.note or None)
    if run is None:
        return f"PARO can be used on this machine; {NO_MODEL}"
    if run.why_not:
        return with_reason("PARO would gain little or nothing here", run.why_not)
    rate = times_as_fast(check.rows)
    if rate is not None and rate <= 1:
        return f"PARO would not pay here: a sparse attention call takes {1 / rate:.2f}x the time of what runs now"
    measured = "" if rate is None else f", attention itself {rate:.1f}x as fast as now"
    low, high = run.gain
    steps = f"{len(run.densities)} of {steps_text(len(run.dense))} sparse"
    return f"PARO would be faster here: {steps}, expected {low:.1f}x to {high:.1f}x per sparse step{measured}"


def times_as_fast(rows: tuple[Row, ...]) -> float | None:
    """PARO's sparse call against the host's present attention, where both were measured."""
    now = now_of(rows)
    ours = next((row.ms for row in rows if row.kind == "paro" and row.density < 1 and row.ms), None)
    return now / ours if now and ours else None


def steps_line(run: Outlook) -> str:
    """`20 steps: the first 4 dense, 16 sparse, keeping 30 % of the blocks (41 % to 20 %)`."""
    dense, sparse = sum(run.dense), len(run.densities)
    if not sparse:
        return f"{steps_text(len(run.dense))}: all dense"
    first = f"the first {f'{dense} ' * (dense > 1)}dense, " if dense else ""
    kept = f"keeping {share(run.density)} of the blocks{range_of([(density, 1) for density in run.densities])}"
    return f"{steps_text(len(run.dense))}: {first}{sparse} sparse, {kept}"


def row_text(row: Row, now: float | None) -> str:
    """Of a row with a time: that, speed against `now` (ms of the host's present attention), and error."""
    rate = "" if now is None or row.kind == "host" else f", {now / row.ms:.2f}x as fast as now"
    ms = f"{row.ms:.3g}" if row.ms < 100 else f"{row.ms:,.0f}"
    return f"{ms} ms{rate}, error {share(row.error)}"


def unmeasured(rows: tuple[Row, ...]) -> list[str]:
    """Rows without a time, a line for each reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.ms is None:
            found.setdefault(row.reason, []).append(row.name)
    return [f"not measured, {reason}: {', '.join(names)}" for reason, names in found.items()]


def now_of(rows: tuple[Row, ...]) -> float | None:
    """Milliseconds of the host's present attention: of another node's on the model, where there is one."""
    return next((row.ms for row in reversed(rows) if row.kind == "host" and row.ms), None)


def _machine(check: Check) -> Iterable[str]:
    its = check.machine
    if its["gpu"] is None:
        yield f"no GPU that PARO can use: ComfyUI computes on {its['device']}"
    else:
        memory = f"{its['memory']} GiB"
        version = f", compute capability {its['compute_capability']}" if its["compute_capability"] else ""
        driver = f", driver {its['driver'] or 'not known'}" if its["rocm"] is None else f", ROCm {its['rocm']}"
        yield f"{its['gpu']}, {memory}{version}{driver}"
    names = ("comfyui", "paro", "torch", "cuda", "triton", "comfy_kitchen", "sageattention", "python")
    yield ", ".join(f"{name} {its.get(name) or 'none'}" for name in names)
    kernels = check.kernels
    if kernels is None:
        return
    note = f"; {kernels.note}" if kernels.note else ""
    if kernels.ready:
        yield f"PARO's kernels are compiled and pass the self-check ({kernels.seconds:.1f} s){note}"
    else:
        yield f"PARO's kernels: {words_of(kernels.reason)}{note or f'; {hint_of(kernels.reason)}'}"


def _run(check: Check) -> Iterable[str]:
    run, size = check.outlook, check.size
    if run is None or size is None:
        return
    layout = size.layout
    context = f", {layout.length - layout.grid_tokens:,} of text or references beside it" * (
        layout.length > layout.grid_tokens
    )
    yield f"{run.title}, {layout.length:,} tokens: {' x '.join(map(str, layout.grid))} of the picture{context}"
    if run.why_not and (check.kernels is None or run.why_not != check.kernels.reason):  # else it is said above
        yield f"no call would be sparse: {words_of(run.why_not)}; {hint_of(run.why_not)}"
    begin = "by the settings alone, " if run.why_not else ""
    yield f"{begin}{steps_line(run)}{f' ({run.part})' if run.part else ''}"
    layers = "every attention layer" if run.sites is None else f"{run.sites} attention layers"
    yield f"{layers} in each sparse step" + (f", but for the blocks {run.dense_blocks}" if run.dense_blocks else "")
    if run.gain is not None:
        words = [f"{low:.1f}x to {high:.1f}x for {what}" for (low, high), what in _gains(run)]
        yield f"expected, by the number of tokens alone: {', '.join(words)}"
    yield f"precision {run.precision}; what the densities rest on: {run.evidence}"


def _gains(run: Outlook) -> list[tuple[tuple[float, float], str]]:
    return [(run.gain, "a sparse step"), (run.run_gain, f"the run of {steps_text(len(run.dense))}")]


def _call(check: Check) -> Iterable[str]:
    if not check.rows:
        return
    size, now = check.size, now_of(check.rows)
    dtype = str(size.dtype).removeprefix("torch.")
    yield f"{size.layout.length:,} tokens, {size.heads} heads of {size.head_dim} channels, {dtype}, one prompt"
    measured = [row for row in check.rows if row.ms is not None]
    yield from (f"{row.name}: {row_text(row, now)}" for row in measured)
    yield from unmeasured(check.rows)
    if not measured:
        return
    if measured[0].heads < size.heads:
        yield f"measured with {measured[0].heads} of the heads, and the times scaled to all of them"
    yield (
        "inputs are random: times hold for any, errors (relative L2 against exact dense attention) compare precisions. "
        "Random attention is spread evenly, so what drops blocks errs far more here than on pictures"
    )


def _others(check: Check) -> Iterable[str]:
    yield from check.others
    if check.others:
        yield f"order: {STACKING}"
