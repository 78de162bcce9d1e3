"""What a comparison of two runs tells its user, in plain words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ...paro_runtime.compiling.readiness import COMPILING
from ...paro_runtime.report.reasons import hint_of, words_of
from ...paro_runtime.report.report import Report
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
    words = f"{seconds_text(first.seconds)} {names.first}, {seconds_text(second.seconds)} {names.second}"
    if first.seconds > 0 and second.seconds > 0:
        words = f"{_times(first.seconds / second.seconds)} as fast: {words}"
    if figures is None:
        return f"{words}."
    if figures.identical:
        return f"{words}; the two results are identical."
    parts = []
    if figures.psnr is not None:
        parts.append(f"PSNR {_decibels(figures.psnr)}")
        if len(figures.frames) > 1:
            noun, (number, worst) = "image" if still else "frame", figures.worst
            parts.append(f"worst {noun} {_decibels(worst)} ({noun} {number} of {len(figures.frames)})")
    if figures.ssim is not None:
        parts.append(f"SSIM {figures.ssim:.3f}")
    return f"{words}; {', '.join(parts)}." if parts else f"{words}."


def text(
    names: Names,
    first: Timed,
    second: Timed,
    figures: Figures | None,
    *,
    compared: str,
    size: tuple[int, int, int, int] | None,
    trouble: str = "",
) -> str:
    """The sentence, then hints, figures, PARO's own report, and what was compared: a line each, as a Markdown list,
    since the page runs plain lines together.

    compared: how was sampled. size: (clips, frames, height, width), None without pictures. trouble: why there are none.
    """
    lines = [sentence(names, first, second, figures, size is not None and size[1] == 1)]
    lines += [each for each in (trouble, figures.missing if figures is not None else "") if each]
    lines += _hints(names, first, second)
    if figures is not None and figures.flicker is not None and not figures.identical:
        lines.append(f"flicker: {figures.flicker:.2f} times that {names.first} (1: alike, above 1: it flickers more)")
    for name, run in _reported(names, first, second):
        lines += _about(name, run)
    lines.append(f"compared: {compared}" + (f"; {_size(*size)}" if size else ""))
    lines.append(f"timed: the sampling alone, not loading and decoding; first {names.first}, then {names.second}")
    if size is not None:
        lines.append(f"picture: {names.labels[0]} | {names.labels[1]} | difference, {DIFFERENCE} times as bright")
    return "\n- ".join(lines)


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
        return f"of {report.steps} steps all were dense ({report.why_dense})"
    return "no self-attention call was seen" if not report.sites else f"all {report.steps} steps were dense"


def _reported(names: Names, first: Timed, second: Timed) -> list[tuple[str, Timed]]:
    """The runs that PARO has something to say about; of another model only where PARO is on it."""
    if not names.first_is_paro:
        return [("PARO", second)]
    both = zip(names.labels, (first, second), strict=True)
    return [(name, run) for name, run in both if run is second or not isinstance(run.report, str)]


def _about(name: str, run: Timed) -> list[str]:
    if isinstance(run.report, str):
        return []
    return [f"{name}: {run.report.status()}", f"{name}: {error_text(run.report)}"]


def _hints(names: Names, first: Timed, second: Timed) -> list[str]:
    hints = []
    for name, run in _reported(names, first, second):
        why, report = why_not_sparse(run.report), run.report
        if why:
            hints.append(f"hint: nothing was sparse ({name}): {words_of(why)}; {hint_of(why)}")
        if isinstance(report, str):
            continue
        if COMPILING in report.calls or any("compiled anew" in note for note in report.notes):
            hints.append(
                f"hint: this run ({name}) included compiling, once on a machine; with another seed it shows its speed"
            )
        if report.backend == "reference" and not why:
            hints.append(
                f"hint: the PyTorch reference computed attention ({name}), not PARO's GPU kernels: right, but slow"
            )
    later = statistics.median(first.steps[1:]) if len(first.steps) > 2 else math.inf
    if first.steps and first.steps[0] > SLOW_START * later:
        hints.append(
            f"hint: the first step {names.first} took {seconds_text(first.steps[0])}, later ones "
            f"{seconds_text(later)}: it loaded or compiled something, which flatters the second run; "
            "run it again with another seed"
        )
    return hints


def _times(rate: float) -> str:
    return f"{rate:.1f}x" if rate >= 1.1 else f"{rate:.2f}x"


def _decibels(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.1f} dB"


def _size(clips: int, frames: int, height: int, width: int) -> str:
    if frames == 1:
        return f"{clips} image{'s' * (clips > 1)} of {width} x {height}"
    return f"{f'{clips} clips of ' if clips > 1 else ''}{frames} frames of {width} x {height}"
