"""What a comparison of two runs tells its user, in plain words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...paro_runtime.compiling.readiness import COMPILING
from ...paro_runtime.report.reasons import NO_CALL, hint_of, words_of
from ...paro_runtime.report.report import Report
from ...paro_runtime.report.sentences import Sentence, joined, listed, say
from ...paro_runtime.report.text import error_text
from .compare import DIFFERENCE, Figures

SLOW_START = 1.5
"""A first step this many times as long as the later ones did something beside computing."""


@dataclass(frozen=True)
class Names:
    """How the two runs are called: in a sentence, on the picture, and whether each may be PARO's."""

    first: str
    second: str
    labels: tuple[str, str]
    first_is_paro: bool


PLAIN = Names("without PARO", "with it", ("without PARO", "with PARO"), False)
TWO_MODELS = Names("with the other model", "with the model", ("other", "model"), True)


@dataclass(frozen=True)
class Timed:
    """One run: seconds of the sampling alone, of each step, and PARO's report of it or why there is none."""

    seconds: float
    steps: Sequence[float]
    report: Report | str


def seconds_text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"


def labels(names: Names, first: Timed, second: Timed) -> list[str]:
    """Of the picture's three panels."""
    pair = zip(names.labels, (first, second), strict=True)
    return [*(f"{name}  {seconds_text(run.seconds)}" for name, run in pair), f"difference x{DIFFERENCE}"]


def sentence(names: Names, first: Timed, second: Timed, figures: Figures | None, still: bool) -> str:
    """The result in one sentence. figures: of the second run against the first, or None; still: pictures, no video."""
    words = say(
        "{first} {how}, {second} {other}",
        first=seconds_text(first.seconds),
        how=names.first,
        second=seconds_text(second.seconds),
        other=names.second,
    )
    if first.seconds > 0 and second.seconds > 0:
        words = say("{rate} as fast: {times}", rate=_times(first.seconds / second.seconds), times=words)
    if figures is None:
        return say("{times}.", times=words)
    if figures.identical:
        return say("{times}; the two results are identical.", times=words)
    parts = list(_parts(figures, still))
    return say("{times}; {figures}.", times=words, figures=listed(parts)) if parts else say("{times}.", times=words)


def _parts(figures: Figures, still: bool) -> Iterator[str]:
    if figures.psnr is not None:
        yield say("PSNR {value}", value=_decibels(figures.psnr))
        if len(figures.frames) > 1:
            number, worst = figures.worst
            values = {"value": _decibels(worst), "number": number, "count": len(figures.frames)}
            if still:
                yield say("worst image {value} (image {number} of {count})", **values)
            else:
                yield say("worst frame {value} (frame {number} of {count})", **values)
    if figures.ssim is not None:
        yield f"SSIM {figures.ssim:.3f}"


def text(
    names: Names,
    first: Timed,
    second: Timed,
    figures: Figures | None,
    *,
    compared: str,
    size: Sequence[int] | None,
    trouble: str = "",
) -> Sentence:
    """The sentence, then hints, figures, PARO's own report, and what was compared: a line each, as a Markdown list,
    since the page runs plain lines together.

    compared: how was sampled. size: (clips, frames, height, width), None without pictures. trouble: why there are none.
    """
    lines = [sentence(names, first, second, figures, size is not None and size[1] == 1)]
    lines += [each for each in (trouble, figures.missing if figures is not None else "") if each]
    lines += _hints(names, first, second)
    if figures is not None and figures.flicker is not None and not figures.identical:
        lines.append(
            say(
                "flicker: {value:.2f} times that {how} (1: alike, above 1: it flickers more)",
                value=figures.flicker,
                how=names.first,
            )
        )
    for name, run in _reported(names, first, second):
        lines += _about(name, run)
    sampled = say("compared: {how}", how=compared)
    lines.append(say("{compared}; {size}", compared=sampled, size=_size(*size)) if size else sampled)
    lines.append(
        say(
            "timed: the sampling alone, not loading and decoding; first {first}, then {second}",
            first=names.first,
            second=names.second,
        )
    )
    if size is not None:
        lines.append(
            say(
                "picture: {first} | {second} | difference, {times} times as bright",
                first=names.labels[0],
                second=names.labels[1],
                times=DIFFERENCE,
            )
        )
    return joined("\n- ", lines)


def why_not_sparse(report: Report | str) -> str:
    """Why no call was sparse, or an empty text where some were."""
    if isinstance(report, str):
        return report
    if report.sites_sparse:
        return ""
    if report.passed:
        return report.passed[0][0]
    if report.fallbacks:
        return report.fallbacks[0][0]
    reasons = {reason: count for reason, count in report.calls.items() if reason not in ("sparse", "dense step")}
    if reasons:
        return max(reasons, key=reasons.get)
    if report.why_dense:
        return say("of {steps} steps all were dense ({why})", steps=report.steps, why=report.why_dense)
    return NO_CALL if not report.sites else say("all {steps} steps were dense", steps=report.steps)


def _reported(names: Names, first: Timed, second: Timed) -> list[tuple[str, Timed]]:
    """The runs that PARO has something to say about; of another model only where PARO is on it."""
    if not names.first_is_paro:
        return [("PARO", second)]
    both = zip(names.labels, (first, second), strict=True)
    return [(name, run) for name, run in both if run is second or not isinstance(run.report, str)]


def _about(name: str, run: Timed) -> list[str]:
    if isinstance(run.report, str):
        return []
    return [say("{name}: {line}", name=name, line=line) for line in (run.report.status(), error_text(run.report))]


def _hints(names: Names, first: Timed, second: Timed) -> list[str]:
    hints: list[str] = []
    for name, run in _reported(names, first, second):
        why, report = why_not_sparse(run.report), run.report
        if why:
            reason = {"reason": words_of(why), "hint": hint_of(why)}
            hints.append(say("hint: nothing was sparse ({name}): {reason}; {hint}", name=name, **reason))
        if isinstance(report, str):
            continue
        if COMPILING in report.calls or any("compiled anew" in note for note in report.notes):
            hints.append(
                say(
                    "hint: this run ({name}) included compiling, once on a machine; "
                    "with another seed it shows its speed",
                    name=name,
                )
            )
        if report.backend == "reference" and not why:
            hints.append(
                say(
                    "hint: the PyTorch reference computed attention ({name}), not PARO's GPU kernels: right, but slow",
                    name=name,
                )
            )
    later = statistics.median(first.steps[1:]) if len(first.steps) > 2 else math.inf
    if first.steps and first.steps[0] > SLOW_START * later:
        hints.append(
            say(
                "hint: the first step {how} took {first}, later ones {later}: it loaded or compiled something, which "
                "flatters the second run; run it again with another seed",
                how=names.first,
                first=seconds_text(first.steps[0]),
                later=seconds_text(later),
            )
        )
    return hints


def _times(rate: float) -> str:
    return f"{rate:.1f}x" if rate >= 1.1 else f"{rate:.2f}x"


def _decibels(value: float) -> str:
    return say("infinite") if math.isinf(value) else f"{value:.1f} dB"


def _size(clips: int, frames: int, height: int, width: int) -> str:
    size = {"clips": clips, "frames": frames, "width": width, "height": height}
    if frames == 1 and clips == 1:
        return say("{clips} image of {width} x {height}", **size)
    if frames == 1:
        return say("{clips} images of {width} x {height}", **size)
    if clips == 1:
        return say("{frames} frames of {width} x {height}", **size)
    return say("{clips} clips of {frames} frames of {width} x {height}", **size)
