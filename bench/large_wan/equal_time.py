"""Rows of `mechanisms` at equal time, and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

# So far beyond what was measured, as a share of the nearest time, a line may be drawn on.
BEYOND = 0.15
DEFAULT = "default"
AT = (0.2, 0.3)
"""Densities of the default at whose time others are compared with it."""


class AtTime(NamedTuple):
    """PSNR in dB; beyond: extrapolated from the two nearest points."""

    psnr: float
    beyond: bool


def at_time(points: Sequence[tuple[float, float]], seconds: float) -> AtTime | None:
    """PSNR at so many seconds, linear between the neighbours of the points (seconds, dB); up to BEYOND outside of them
    the line through the two nearest goes on, no further than they lie apart: of two that took the same time but for
    noise it says nothing. None further out, and where there is no line."""
    points = sorted(points)
    for a, b in pairwise(points):
        if a[0] <= seconds <= b[0]:
            return AtTime(_on_line(a, b, seconds), False)
    if len(points) == 1 and points[0][0] == seconds:
        return AtTime(points[0][1], False)
    if len(points) < 2:
        return None
    a, b = points[:2] if seconds < points[0][0] else points[-2:]
    end = points[0][0] if seconds < points[0][0] else points[-1][0]
    if abs(seconds - end) > min(BEYOND * end, b[0] - a[0]):
        return None
    return AtTime(_on_line(a, b, seconds), True)


def _on_line(a: tuple[float, float], b: tuple[float, float], seconds: float) -> float:
    if a[0] == b[0]:
        return (a[1] + b[1]) / 2
    return a[1] + (b[1] - a[1]) * (seconds - a[0]) / (b[0] - a[0])


def gains(rows: Sequence[dict], at: Sequence[float] = AT) -> dict[str, dict[float, AtTime | None]]:
    """Of each variant, by the density of the default at whose time: its dB less the default's there. Rows of one
    set-up on one device; densities at which the default was not measured are left out."""
    default = {row["density"]: row for row in rows if row["name"] == DEFAULT}
    found: dict[str, dict[float, AtTime | None]] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        points = [(row["attention_seconds"], row["psnr"]) for row in rows if row["name"] == name]
        found[name] = {}
        for density in at:
            if density not in default:
                continue
            its = at_time(points, default[density]["attention_seconds"])
            found[name][density] = its and AtTime(its.psnr - default[density]["psnr"], its.beyond)
    return found


def _gain_text(gain: AtTime | None) -> str:
    if gain is None:
        return "-"
    return f"{gain.psnr:+.2f}{' (beyond)' if gain.beyond else ''}"


def _columns(rows: Sequence[dict]) -> list[float]:
    return sorted({row["density"] for row in rows})


def table(rows: Sequence[dict]) -> str:
    """Markdown of rows of one set-up: dB mean (worst) at each density, flicker and ms of a sparse step at each, what
    comes once in a run, and dB at equal time less the default's."""
    densities, found = _columns(rows), {(row["name"], row["density"]): row for row in rows}
    its_gains = gains(rows)
    at = [density for density in AT if (DEFAULT, density) in found]
    head = ["variant", *(f"dB at {density}" for density in densities), "flicker", "ms a sparse step", "once, ms"]
    head += [f"dB at the time of {density}" for density in at]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    kind = None
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [found.get((name, density)) for density in densities]
        present = [row for row in cells if row is not None]
        if present[0]["kind"] != kind:
            kind = present[0]["kind"]
            lines.append(f"| *{kind}* |" + " |" * (len(head) - 1))
        figures = ["" if row is None else f"{row['psnr']:.2f} ({row['psnr_worst']:.2f})" for row in cells]
        figures.append(" / ".join(f"{row['flicker']:.3f}" for row in present))
        figures.append(" / ".join(f"{row['sparse_step_ms']:.2f}" for row in present))
        figures.append(" / ".join(f"{1000 * row['once_seconds']:.1f}" for row in present))
        figures += [_gain_text(its_gains[name][density]) for density in at]
        lines.append(f"| {name}{' (masks for free)' if present[0]['free_masks'] else ''} | {' | '.join(figures)} |")
    return "\n".join(lines)


def tables(paths: Sequence[Path]) -> str:
    """A table for each set-up and device among the files. Of a row that is in several, the last file's counts."""
    setups: dict[str, dict] = {}
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts = content["facts"]
        kept = setups.setdefault(json.dumps(facts, sort_keys=True), {"facts": facts, "dense": [], "rows": {}})
        kept["dense"].append(content["dense_attention_seconds"])
        for row in content["rows"]:
            kept["rows"][row["name"], row["density"]] = row
    parts = []
    for one in setups.values():
        facts, rows = one["facts"], sorted(one["rows"].values(), key=lambda row: row["kind"])
        dense = ", ".join(f"{seconds:.3f}" for seconds in dict.fromkeys(one["dense"]))
        title = f"{facts['grid']}, {facts['clips']} clips, {facts['steps']} steps, {facts['dense_steps']} dense, "
        title += f"{facts['precision']}, {facts['device']}: dense attention {dense} s; of each density "
        title += ", ".join(map(str, _columns(rows))) + " where a cell has several figures"
        parts.append(f"{title}.\n\n{table(rows)}")
    return "\n\n".join(parts)
