"""What the suite `tiny` runs, and how its figures are read."""

from __future__ import annotations

import itertools

from ...paro_runtime.calibration.calibrator import Method
from .tiny import STEPS, Variant

PAPER = Method(criterion="mass", tiles=False)


def standard_variants(densities=(0.05, 0.1, 0.2, 0.3), dense_steps=(0, 3)) -> list[Variant]:
    """The table of the acceptance: orders, fixed masks, tail and dropping. Others' methods keep one mask."""
    made = []
    for density, dense in itertools.product(densities, dense_steps):
        common = (density, dense)
        theirs = {"schedule": "constant", "refresh": False}
        made += [
            Variant("original order, drop", *common, tail=False, order="original", method=PAPER, **theirs),
            Variant("paper's metric, drop", *common, tail=False, order="paper", method=PAPER, **theirs),
            Variant("radial", *common, tail=False, plan="radial", **theirs),
            Variant("window", *common, tail=False, plan="window", **theirs),
            Variant("random", *common, tail=False, plan="random", **theirs),
            Variant("ours, offline", *common),
            Variant("ours, offline, drop", *common, tail=False),
            Variant("ours, offline, constant density", *common, schedule="constant"),
            Variant("ours, offline, blocks by mass", *common, method=Method(criterion="mass")),
            Variant("ours, offline, plain means", *common, method=Method(expansions=0)),
            Variant("ours, offline, bias kept", *common, refresh=False),
            Variant("original order, tail", *common, order="original"),
        ]
    return made


def passing_variants(densities=(0.05, 0.1, 0.2, 0.3)) -> list[Variant]:
    """On the fly, three dense steps and one; offline with one too, to compare with. By default blocks are kept by error
    after three dense steps and by mass after one."""
    made = []
    theirs = {"method": PAPER, "schedule": "constant"}
    for dense, density in itertools.product((3, 1), densities):
        passing = {"density": density, "dense_steps": dense, "plan": "passing"}
        made += [
            Variant("ours, passing", **passing),
            Variant("ours, passing, constant density", **passing, schedule="constant"),
            Variant("ours, passing, drop", **passing, tail=False),
            Variant("ours, passing, blocks by mass", **passing, method=Method(criterion="mass")),
            Variant("ours, passing, blocks by error", **passing, method=Method(criterion="error")),
            Variant("ours, passing, plain means", **passing, method=Method(expansions=0)),
            Variant("ours, passing, bias kept", **passing, refresh=False),
            Variant("original order, passing, drop", **passing, tail=False, order="original", **theirs),
        ]
        if dense == 1:
            made.append(Variant("ours, offline", density, dense))
    return made


# What ours is compared with: line of the acceptance, what is asked, ours, the other.
COMPARISONS = (
    (0, "tail against drop", "ours, offline", "ours, offline, drop"),
    (0, "tail against drop, passing", "ours, passing", "ours, passing, drop"),
    (2, "ours against the original order", "ours, offline", "original order, drop"),
    (2, "ours against radial", "ours, offline", "radial"),
    (2, "ours against window", "ours, offline", "window"),
    (2, "ours against the paper's metric", "ours, offline", "paper's metric, drop"),
    (5, "passing against offline", "ours, passing", "ours, offline"),
    (None, "pools around mean queries against plain means, passing", "ours, passing", "ours, passing, plain means"),
    (None, "pools around mean queries against plain means, offline", "ours, offline", "ours, offline, plain means"),
    (None, "falling against constant density, passing", "ours, passing", "ours, passing, constant density"),
    (None, "falling against constant density, offline", "ours, offline", "ours, offline, constant density"),
)


def acceptance(records: list[dict]) -> str:
    """Differences of mean PSNR in dB that the acceptance asks for, as far as there are records: a line per comparison,
    grid and number of dense steps, a figure per density."""
    found = {(r["grid"], r["dense_steps"], r["name"], r["density"]): r["psnr"] for r in records}
    runs = sorted({key[:2] for key in found})
    lines = ["Differences of mean PSNR in dB:"]
    for number, title, ours, other in COMPARISONS:
        for grid, dense in runs:
            both = [
                (density, found[grid, dense, ours, density] - found[grid, dense, other, density])
                for density in sorted({key[3] for key in found})
                if {(grid, dense, ours, density), (grid, dense, other, density)} <= found.keys()
            ]
            figures = [f"{density}: {gain:+.2f}" for density, gain in both]
            half = {(grid, dense, ours, 0.1), (grid, dense, other, 0.2)} <= found.keys()
            if number == 0 and half:
                gain = found[grid, dense, ours, 0.1] - found[grid, dense, other, 0.2]
                figures.append(f"0.1 with tail against 0.2 dropping: {gain:+.2f}")
            if figures:
                line = "" if number is None else f"line {number}, "
                lines.append(f"- {line}{title}, {grid}, {dense} of {STEPS} dense: {', '.join(figures)}")
    return "\n".join(lines)


def overview(records: list[dict]) -> str:
    """Markdown: mean PSNR in dB (worst video), a line per variant under its number of dense steps, a column for
    each grid and density."""
    columns = sorted({(r["grid"], r["density"]) for r in records})
    found = {(r["dense_steps"], r["name"], r["grid"], r["density"]): r for r in records}
    lines = [
        "| | " + " | ".join(f"{grid}, {density}" for grid, density in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for dense in sorted({r["dense_steps"] for r in records}):
        lines.append(f"| *{dense} of {STEPS} steps dense* |" + " |" * len(columns))
        for name in dict.fromkeys(r["name"] for r in records if r["dense_steps"] == dense):
            cells = [found.get((dense, name, *column)) for column in columns]
            figures = ["" if r is None else f"{r['psnr']:.1f} ({r['psnr_worst']:.1f})" for r in cells]
            lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def table(records: list[dict]) -> str:
    """Markdown, a line per grid, dense steps, density and variant."""
    head = "| grid | dense steps | density | variant | PSNR mean | worst | SSIM | latent cosine |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for r in sorted(records, key=lambda r: (r["grid"], r["dense_steps"], r["density"])):
        figures = f"{r['psnr']:.2f} | {r['psnr_worst']:.2f} | {r['ssim']:.3f} | {r['latent_cosine']:.4f}"
        lines.append(f"| {r['grid']} | {r['dense_steps']} of {STEPS} | {r['density']} | {r['name']} | {figures} |")
    return "\n".join(lines)
