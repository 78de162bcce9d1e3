"""Render the committed results of the speed benchmarks into docs/benchmarks.md: `python bench/report.py`.

Cells for which there is no figure say "not measured".
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TARGET = ROOT / "docs" / "benchmarks.md"
MISSING = "not measured"
DENSE_SDPA = ("sdpa_flash", "sdpa_cudnn")


def cell(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def best_dense(rows: list[dict]) -> float | None:
    """Milliseconds of the faster of torch's dense attentions among the rows of a shape."""
    times = [row["total_ms"] for row in rows if row["name"] in DENSE_SDPA and "total_ms" in row]
    return min(times, default=None)


def efficiency(row: dict, rows: list[dict]) -> float | None:
    """Kernel time over density times the dense kernel's time of the same precision; 1 is ideal."""
    for other in rows:
        same = other["name"] == row["name"] and other["density"] == 1 and "kernel_ms" in other
        if same and "kernel_ms" in row and row["density"] < 1:
            return row["kernel_ms"] / (row["kept"] * other["kernel_ms"])
    return None


def shape_table(rows: list[dict]) -> list[str]:
    """One Markdown table: every measured call of one shape."""
    dense = best_dense(rows)
    lines = [
        "| mask | density | what | tile | error | kernel ms | pre-pass ms | total ms | TFLOPS | times best dense SDPA "
        "| sparse efficiency | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        total = row.get("total_ms")
        ratio = dense / total if dense and total else None
        error = row.get("error")
        cells = [
            row["mask"],
            f"{row['kept']:.3f}" if row["density"] < 1 else "1",
            row["name"] + (" + tail" if row.get("tail") else ""),
            row.get("tile", ""),
            MISSING if error is None else f"{error:.1e}",
            cell(row.get("kernel_ms")) if row["name"].startswith("paro") else "",
            cell(row.get("prepass_ms")) if row["name"].startswith("paro") else "",
            f"{MISSING} ({row['reason']})" if "reason" in row else cell(total),
            cell(row.get("tflops"), 0),
            cell(ratio),
            cell(efficiency(row, rows)) if row["name"].startswith("paro") and row["density"] < 1 else "",
            cell(row.get("peak_mb"), 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def step_tables(reports: list[dict]) -> list[str]:
    """Markdown: whole denoising steps, a table per GPU."""
    lines = [
        "# One denoising step",
        "",
        "From `bench/results/end_to_end*.json`, which `python bench/end_to_end.py` printed: real architectures at real "
        "sizes with random weights, bf16, one evaluation. Dense is torch's fastest attention; PARO at density 1 is its "
        f"own kernel without a mask. Models that are not listed: {MISSING}.",
        "",
    ]
    for report in reports:
        lines += [
            f"## {report['gpu']}",
            "",
            f"torch {report['torch']}, triton {report['triton']}, {report['date']}.",
            "",
        ]
        lines += [report["note"], ""] if report.get("note") else []
        lines += [
            "| model | tokens | attention | density | step ms | attention ms | step gain | attention gain | peak GB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in report["rows"]:
            cells = [
                row["title"],
                f"{row['tokens']}",
                row["method"] + (f" {row['precision']}" if "precision" in row else ""),
                cell(row.get("density")) if "density" in row else "1",
                cell(row["step_ms"], 0),
                cell(row["attention_ms"], 0),
                cell(row["step_gain"]) if "step_gain" in row else "1",
                cell(row["attention_gain"]) if "attention_gain" in row else "1",
                cell(row["peak_gb"], 1),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines if reports else [*lines, f"Nothing: {MISSING}.", ""]


def calibration_tables(reports: list[dict]) -> list[str]:
    """Markdown: what calibrating one site costs, a table per GPU."""
    lines = [
        "# Calibration in passing",
        "",
        "From `bench/results/calibration*.json`, which `python bench/calibration.py` printed: one site of each model, "
        "in ms. `in all` is what a calibrating step pays for a site beside its dense attention; its largest parts "
        "stand before it. The bias is measured again in a few sparse steps, in fewer of them corrections are made, and "
        "added in all; masks are measured anew once, after a plan of pure noise. A plan's masks are made at the end.",
        "",
    ]
    for report in reports:
        lines += [
            f"## {report['gpu']}",
            "",
            f"torch {report['torch']}, triton {report['triton']}, {report['date']}, commit {report['commit']}.",
            "",
        ]
        lines += [report["note"], ""] if report.get("note") else []
        lines += [
            "| model | tokens | heads | dense attention | orders | tail | in all | times dense "
            "| peak MiB | bias again | times dense | peak MiB | half the heads corrected | the same, carried on "
            "| masks anew | masks of a site |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in report["rows"]:
            times = [row.get(f"{name}_ms") for name in ("dense", "orders", "tail", "observe")]
            cells = [row["shape"], f"{row['length']}", f"{row['heads']}", *map(cell, times), cell(row.get("ratio"))]
            cells += [cell(row.get("peak_mib"), 0), cell(row.get("refresh_ms")), cell(row.get("refresh_ratio"), 3)]
            cells += [cell(row.get("refresh_peak_mib"), 0)]
            cells += [cell(row.get(f"{name}_ms")) for name in ("correct", "carried", "look")]
            cells += [cell(row.get("plan_ms"), 0)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines if reports else [*lines, f"Nothing: {MISSING}.", ""]


def tiny_calibration_tables(reports: list[dict]) -> list[str]:
    """Markdown: what a calibrating step of the tiny model costs on one core, a table per CPU."""
    lines = [
        "# Calibration in passing on a CPU",
        "",
        "From `bench/results/tiny_calibration*.json`, which `python bench/calibration.py --tiny` printed: one step of "
        "the tiny trained model, its four layers together, float32, in ms, medians. `in all` is what the calibrating "
        "step pays beside its attention, plan included; its largest parts stand before it. `times attention` is the "
        "median of the repeats' ratios, `the first time` what a process pays once.",
        "",
    ]
    for report in reports:
        lines += [
            f"## {report['cpu']}, {report['threads']} thread",
            "",
            f"torch {report['torch']}, Python {report['python']}, {report['date']}, commit {report['commit']}, "
            f"{report['repeats']} repeats.",
            "",
            *([report["note"], ""] if report.get("note") else []),
            "| grid | tokens | attention | orders | tail | falloff | rotation | in all | times attention "
            "| the first time |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in report["rows"]:
            times = [row.get(f"{name}_ms") for name in ("attention", "orders", "tail", "falloff", "rotation", "all")]
            cells = [row["grid"], f"{row['length']}", *map(cell, times)]
            cells += [cell(row.get("ratio")), cell(row.get("first_ratio"))]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines if reports else [*lines, f"Nothing: {MISSING}.", ""]


def read(pattern: str) -> list[dict]:
    """The committed results whose file names match."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def render(reports: list[dict]) -> str:
    """The whole page."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python bench/report.py` from `bench/results/attention*.json`, which `python bench/attention.py` "
        "printed. Do not edit.",
        "",
        "Total includes the pre-pass (reorder, quantise, pool). Errors are relative L2 against float32 attention under "
        "the same mask, on sampled heads and rows of normal data with channel outliers in K.",
        "",
    ]
    if not reports:
        lines += ["Nothing has been measured yet: every figure is " + MISSING + ".", ""]
    for report in reports:
        lines += [f"## {report['gpu']}", ""]
        lines += [
            f"torch {report['torch']}, triton {report['triton']}, {report['date']}, commit {report['commit']}.",
            "",
        ]
        lines += [report["note"], ""] if report.get("note") else []
        shapes = dict.fromkeys(row["shape"] for row in report["rows"])
        for shape in shapes:
            rows = [row for row in report["rows"] if row["shape"] == shape]
            first = rows[0]
            lines += [f"### {shape}: {first['length']} tokens, {first['heads']} heads, D = {first['dim']}", ""]
            lines += [*shape_table(rows), ""]
    return "\n".join(lines)


def main() -> int:
    reports = read("attention*.json")
    TARGET.parent.mkdir(exist_ok=True)
    rest = [*step_tables(read("end_to_end*.json")), *calibration_tables(read("calibration*.json"))]
    rest += tiny_calibration_tables(read("tiny_calibration*.json"))
    page = render(reports) + "\n" + "\n".join(rest)
    TARGET.write_text(page.rstrip() + "\n", encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {sum(len(r['rows']) for r in reports)} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
