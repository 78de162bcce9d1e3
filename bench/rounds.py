"""Time and energy of a call, from `bench/results/attention_rounds_*.json`: a table for `docs/kernels.md`."""

from __future__ import annotations

MARKS = ("<!-- energy: written by bench/report.py -->", "<!-- /energy -->")
# What the page calls the variants that are the shipped kernels.
SHIPPED = {"old": "Gluon", "triton": "Triton"}


def energy_block(reports: list[dict]) -> str:
    """Markdown: milliseconds and joules of the shipped kernels at D = 128, of the last run of every report."""
    lines = []
    for report in reports:
        last = max(row["run"] for row in report["rows"])
        rows = [row for row in report["rows"] if row["run"] == last and row["dim"] == 128]
        found = {(row["precision"], row["density"], row["tail"], row["variant"]): row for row in rows}
        lines += [
            f"{report['gpu']}, {report['length']:,} tokens, {report['heads']} heads, D = 128, whole calls; torch "
            f"{report['torch']}, Triton {report['triton']}, {report['date']}, commit {report['commit']}. The energy "
            "counter is good to some 5 %.",
            "",
            "| precision | density | " + " | ".join(f"{name}: ms | joules" for name in SHIPPED.values()) + " |",
            "|---|---|" + "---|---|" * len(SHIPPED),
        ]
        for precision, density, tail in dict.fromkeys(key[:3] for key in found):
            cells = [precision, f"{density:g}" + ", tail" * tail]
            for variant in SHIPPED:
                row = found[precision, density, tail, variant]
                cells += [f"{row['ms']:.1f}", f"{row['joules']:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
