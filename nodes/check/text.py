"""What a check tells its user: a sentence, then the facts behind it in groups."""

from __future__ import annotations

from collections.abc import Iterable

from ...paro_runtime.report.reasons import hint_of, with_reason, words_of
from ...paro_runtime.report.sentences import Sentence, joined, listed, say
from ...paro_runtime.report.text import in_groups
from ...paro_runtime.report.verdict import range_of, share, steps_text
from .card import card_line
from .check import Check, Outlook
from .measure import Row

NO_MODEL = "connect a model for what a run would do with it"
STACKING = (
    "PARO Patch Model after the loader, LoRAs and everything that changes the model; another attention node before or "
    "after it, as you like: PARO puts itself first and leaves that node the calls it does not take"
)


def check_text(check: Check) -> Sentence:
    """Several lines."""
    groups = {
        say("This machine"): _machine(check),
        say("What a run would do"): _run(check),
        say("One attention call"): _call(check),
        say("Other nodes on the model"): _others(check),
        say("Notes"): check.notes,
    }
    text, card = in_groups(check_verdict(check), groups), card_line(check)
    if card is None:
        return text
    sharing = say(
        "To share these times, copy the next line whole: it tells card, versions, call and times, and nothing else"
    )
    return joined("\n", (text, "", sharing, card))


def check_verdict(check: Check) -> str:
    """One sentence: whether PARO would help here, and if not, what to do."""
    kernels, run = check.kernels, check.outlook
    if kernels is None:
        return say("Not all could be checked: see the last lines")
    if not kernels.ready:
        return with_reason(say("PARO cannot be used now"), kernels.reason, kernels.note or None)
    if run is None:
        return say("PARO can be used on this machine; {hint}", hint=NO_MODEL)
    if run.why_not:
        return with_reason(say("PARO would gain little or nothing here"), run.why_not)
    rate = times_as_fast(check.rows)
    if rate is not None and rate <= 1:
        slower = 1 / rate
        return say(
            "PARO would not pay here: a sparse attention call takes {rate:.2f}x the time of what runs now", rate=slower
        )
    low, high = run.gain
    faster = say(
        "PARO would be faster here: {steps}, expected {low:.1f}x to {high:.1f}x per sparse step",
        steps=say("{sparse} of {steps} sparse", sparse=len(run.densities), steps=steps_text(len(run.dense))),
        low=low,
        high=high,
    )
    if rate is None:
        return faster
    return say("{verdict}, attention itself {rate:.1f}x as fast as now", verdict=faster, rate=rate)


def times_as_fast(rows: tuple[Row, ...]) -> float | None:
    """PARO's sparse call against the host's present attention, where both were measured."""
    now = now_of(rows)
    ours = next((row.ms for row in rows if row.kind == "paro" and row.density < 1 and row.ms), None)
    return now / ours if now and ours else None


def steps_line(run: Outlook) -> str:
    """`20 steps: the first 4 dense, 16 sparse, keeping 30 % of the blocks (41 % to 20 %)`."""
    dense, sparse = sum(run.dense), len(run.densities)
    steps = steps_text(len(run.dense))
    if not sparse:
        return say("{steps}: all dense", steps=steps)
    kept = say("keeping {density} of the blocks", density=share(run.density))
    kept = joined("", (kept, range_of([(density, 1) for density in run.densities])))
    if dense > 1:
        first = say("the first {count} dense, {sparse} sparse", count=dense, sparse=sparse)
    elif dense:
        first = say("the first dense, {sparse} sparse", sparse=sparse)
    else:
        first = say("{sparse} sparse", sparse=sparse)
    return say("{steps}: {dense}, {kept}", steps=steps, dense=first, kept=kept)


def row_text(row: Row, now: float | None) -> str:
    """Of a row with a time: that, speed against `now` (ms of the host's present attention), and error."""
    ms = f"{row.ms:.3g}" if row.ms < 100 else f"{row.ms:,.0f}"
    if now is None or row.kind == "host":
        return say("{ms} ms, error {error}", ms=ms, error=share(row.error))
    rate = now / row.ms
    return say("{ms} ms, {rate:.2f}x as fast as now, error {error}", ms=ms, rate=rate, error=share(row.error))


def unmeasured(rows: tuple[Row, ...]) -> list[str]:
    """Rows without a time, a line for each reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.ms is None:
            found.setdefault(row.reason, []).append(row.name)
    return [
        say("not measured, {reason}: {names}", reason=reason, names=listed(names)) for reason, names in found.items()
    ]


def now_of(rows: tuple[Row, ...]) -> float | None:
    """Milliseconds of the host's present attention: of another node's on the model, where there is one."""
    return next((row.ms for row in reversed(rows) if row.kind == "host" and row.ms), None)


def _machine(check: Check) -> Iterable[str]:
    its = check.machine
    if its["gpu"] is None:
        yield say("no GPU that PARO can use: ComfyUI computes on {device}", device=its["device"])
    else:
        parts = [its["gpu"], f"{its['memory']} GiB"]
        if its["compute_capability"]:
            parts.append(say("compute capability {version}", version=its["compute_capability"]))
        if its["rocm"] is None:
            parts.append(say("driver {version}", version=its["driver"] or say("not known")))
        else:
            parts.append(f"ROCm {its['rocm']}")
        yield listed(parts)
    names = ("comfyui", "paro", "torch", "cuda", "triton", "comfy_kitchen", "sageattention", "python")
    yield ", ".join(f"{name} {its.get(name) or 'none'}" for name in names)
    kernels = check.kernels
    if kernels is None:
        return
    if not kernels.ready:
        ready = say("PARO's kernels: {reason}", reason=words_of(kernels.reason))
    else:
        ready = say("PARO's kernels are compiled and pass the self-check ({seconds:.1f} s)", seconds=kernels.seconds)
    hint = kernels.note if kernels.ready else kernels.note or hint_of(kernels.reason)
    yield say("{line}; {hint}", line=ready, hint=hint) if hint else ready


def _run(check: Check) -> Iterable[str]:
    run, size = check.outlook, check.size
    if run is None or size is None:
        return
    layout = size.layout
    grid = " x ".join(map(str, layout.grid))
    tokens = say("{model}, {count:,} tokens: {grid} of the picture", model=run.title, count=layout.length, grid=grid)
    beside = layout.length - layout.grid_tokens
    yield say("{tokens}, {count:,} of text or references beside it", tokens=tokens, count=beside) if beside else tokens
    if run.why_not and (check.kernels is None or run.why_not != check.kernels.reason):  # else it is said above
        reason, hint = words_of(run.why_not), hint_of(run.why_not)
        yield say("no call would be sparse: {reason}; {hint}", reason=reason, hint=hint)
    steps = say("{steps} ({part})", steps=steps_line(run), part=run.part) if run.part else steps_line(run)
    yield say("by the settings alone, {steps}", steps=steps) if run.why_not else steps
    layers = say("every attention layer in each sparse step")
    if run.sites is not None:
        layers = say("{count} attention layers in each sparse step", count=run.sites)
    if run.dense_blocks:
        layers = say("{layers}, but for the blocks {blocks}", layers=layers, blocks=run.dense_blocks)
    yield layers
    if run.gain is not None:
        (low, high), (least, most) = run.gain, run.run_gain
        yield say(
            "expected, by the number of tokens alone: {low:.1f}x to {high:.1f}x for a sparse step, "
            "{least:.1f}x to {most:.1f}x for the run of {steps}",
            low=low,
            high=high,
            least=least,
            most=most,
            steps=steps_text(len(run.dense)),
        )
    rest_on = {"precision": run.precision, "evidence": run.evidence}
    yield say("precision {precision}; what the densities rest on: {evidence}", **rest_on)


def _call(check: Check) -> Iterable[str]:
    if not check.rows:
        return
    size, now = check.size, now_of(check.rows)
    dtype = str(size.dtype).removeprefix("torch.")
    yield say(
        "{tokens:,} tokens, {heads} heads of {channels} channels, {dtype}, one prompt",
        tokens=size.layout.length,
        heads=size.heads,
        channels=size.head_dim,
        dtype=dtype,
    )
    measured = [row for row in check.rows if row.ms is not None]
    yield from (say("{name}: {time}", name=row.name, time=row_text(row, now)) for row in measured)
    yield from unmeasured(check.rows)
    if not measured:
        return
    if measured[0].heads < size.heads:
        yield say("measured with {heads} of the heads, and the times scaled to all of them", heads=measured[0].heads)
    yield say(
        "inputs are random: times hold for any, errors (relative L2 against exact dense attention) compare precisions. "
        "Random attention is spread evenly, so what drops blocks errs far more here than on pictures"
    )


def _others(check: Check) -> Iterable[str]:
    yield from check.others
    if check.others:
        yield say("order: {order}", order=STACKING)
