"""Render the committed results of the speed benchmarks into docs/benchmarks.md, and of whole runs into the README.

`python bench/report.py`. Cells for which there is no figure say "not measured". The README's only speed claims stand
between pairs of marks in it and are written here, as is the table of time and energy in docs/kernels.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import cards, expected, rounds  # noqa: E402

RESULTS = ROOT / "bench" / "results"
TARGET = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
KERNELS = ROOT / "docs" / "kernels.md"
CLAIM_MARKS = ("<!-- claim: written by bench/report.py -->", "<!-- /claim -->")
SPEED_MARKS = ("<!-- speed: written by bench/report.py -->", "<!-- /speed -->")
# The run of the README's one claim: the largest of the video models in wide use.
CLAIMED = "wan14b-720p-4"
# What the README calls the runs of bench/whole_run.py; others go by their own names.
TITLES = {
    "wan14b-720p-4": "Wan 2.1 14B, 1280x720, 81 frames, 4 steps",
    "wan14b-480p-20": "Wan 2.1 14B, 832x480, 81 frames, 20 steps",
    "wan1.3b-480p-12": "Wan 2.1 1.3B, 832x480, 81 frames, 12 steps",
    "wan22-720p-2+2": "Wan 2.2 14B, 1280x720, 81 frames, 2 + 2 steps",
    "wan22-480p-10+10": "Wan 2.2 14B, 832x480, 81 frames, 10 + 10 steps",
    "hunyuan15-720p-4": "HunyuanVideo 1.5, 1280x720, 121 frames, 4 steps",
    "ltx2-stage2": "LTX-2, second stage, 1920x1088, 121 frames, 3 steps",
    "minimax-h3-8": "MiniMax H3 (40 of 50 layers), 1344x768, 124 frames, 8 steps",
    "flux-2048-8": "Flux 1, 2048x2048, 8 steps",
    "qwen-image-1328-8": "Qwen-Image, 1328x1328, 8 steps",
    "z-image-1536-8": "Z-Image, 1536x1536, 8 steps",
    "flux-1024-8": "Flux 1, 1024x1024, 8 steps",
    "z-image-1024-8": "Z-Image, 1024x1024, 8 steps",
}
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


PARTS = {
    "dense_attention": "dense attention",
    "sparse_attention": "sparse attention",
    "rest_of_model": "rest of the model",
    "observing": "observing",
    "planning": "planning",
    "masks": "masks",
    "bias": "bias",
    "compiling": "compiling",
    "loading_plan": "loading the plan",
}
PARO_RUNS = {"first_ever": "first ever", "first": "first", "second": "second", "remembered": "remembered"}


def whole_run_tables(reports: list[dict]) -> list[str]:
    """Markdown: whole samplings, a table per GPU."""
    lines = [
        "# Whole runs",
        "",
        "From `bench/results/whole_run*.json`, which `python bench/whole_run.py` printed: from the first sampling step "
        "to the finished latent in a real ComfyUI, real architectures at real sizes with random weights, everything of "
        "a case in one process on one card. `dense` is ComfyUI's default attention, `int8` its INT8 backend, "
        "`sol_attn` its sparse kernel at a top-k of 0.3 under the rules of its node, with INT8 dense steps. PARO: "
        "`first ever` compiles its kernels, `first` and `second` find them, `remembered` finds the first one's plan as "
        "well, the others make their own. The columns after "
        "`host GB` say where the seconds went; they add up to the whole. Waiting counts for what was waited for, and "
        "work in the background that nothing waited for does not count. Cross-attention counts as dense attention. In "
        "brackets: how much of the host memory is pages of files, libraries and the kernels in them above all.",
        "",
    ]
    for report in reports:
        lines += [
            f"## {report['gpu']}: whole runs",
            "",
            f"torch {report['torch']}, triton {report['triton']}, ComfyUI {report['comfyui']}, {report['date']}, "
            f"commit {report['commit']}.",
            "",
        ]
        lines += [report["note"], ""] if report.get("note") else []
        heads = ["case", "attention", "run", "seconds", "speed-up", "sites sparse", "fallbacks", "peak GPU GB"]
        heads += ["host GB", *PARTS.values()]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        lines += [_whole_run_line(row) for row in report["rows"]]
        notes = {f"{row['case']}: {note}." for row in report["rows"] for note in row.get("notes", [])}
        others = {row.get("commit", report["commit"]) for row in report["rows"]} - {report["commit"]}
        lines += ["", *sorted(notes)] if notes else []
        lines += ["", f"Some rows are of commits {', '.join(sorted(others))}."] if others else []
        lines.append("")
    return lines if reports else [*lines, f"Nothing: {MISSING}.", ""]


def _whole_run_line(row: dict) -> str:
    parts = row.get("parts") or {}
    known = row.get("sites_sparse") is not None
    cells = [
        row["case"],
        row["attention"],
        PARO_RUNS.get(row["run"], ""),
        f"{MISSING} ({row['error']})" if "error" in row else cell(row.get("seconds"), 1),
        cell(row.get("speedup")),
        f"{row['sites_sparse']} of {row['sites']}" if known else "" if row["run"] is None else MISSING,
        f"{sum(row['fallbacks'].values())}" if known else "" if row["run"] is None else MISSING,
        cell(row.get("peak_gpu_gb"), 1),
        cell(row.get("host_gb")) + (f" ({cell(row['host_files_gb'])})" if row.get("host_files_gb") else ""),
        *(cell(parts.get(name), 1) for name in PARTS),
    ]
    return "| " + " | ".join(text.replace("|", "/").replace("\n", " ") for text in cells) + " |"


def _found(report: dict) -> dict[tuple[str, str, str | None], dict]:
    """Rows of a whole-run report by case, attention and run."""
    return {(row["case"], row["attention"], row["run"]): row for row in report["rows"]}


def claim_block(reports: list[dict]) -> str:
    """Markdown: one sentence on one run on the first card on which it was measured, with PARO's kernels compiled."""
    for report in reports:
        found = _found(report)
        dense, paro, other = (
            found.get((CLAIMED, *key), {}) for key in (("dense", None), ("paro", "second"), ("sol_attn", None))
        )
        if "seconds" in dense and "seconds" in paro:
            slow = f"ComfyUI's default attention takes {dense['seconds']:.1f} ({paro['speedup']:.1f} times as fast)"
            slow += f" and its sparse node {other['seconds']:.1f}" if "seconds" in other else ""
            return (
                f"**{TITLES[CLAIMED]}, on one {report['gpu']}: {paro['seconds']:.1f} seconds, where {slow}.** "
                f"Measured {report['date']} at commit {paro.get('commit', report['commit'])} in ComfyUI "
                f"{report['comfyui']}, with random weights: it says how fast, not how good.\n"
            )
    return f"Whole runs: {MISSING}.\n"


def speed_block(reports: list[dict]) -> str:
    """Markdown: a line per whole run and card."""
    if not reports:
        return f"Whole runs: {MISSING}.\n"
    others = [("int8", None), ("sol_attn", None), ("paro", "first_ever"), ("paro", "second")]
    lines = [
        "| model and run | card | ComfyUI's default | its INT8 | its sparse node | PARO, first ever | PARO, later |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        found = _found(report)
        for case in dict.fromkeys(row["case"] for row in report["rows"]):
            seconds = found.get((case, "dense", None), {}).get("seconds")
            cells = [TITLES.get(case, case), report["gpu"], MISSING if seconds is None else f"{seconds:.1f} s"]
            cells += [cell(found.get((case, *other), {}).get("speedup")) for other in others]
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for report in reports:
        commits = sorted({row.get("commit", report["commit"]) for row in report["rows"]})
        lines.append(
            f"{report['gpu']}: ComfyUI {report['comfyui']}, torch {report['torch']}, Triton {report['triton']}, up to "
            f"{report['date']}, at {', '.join(commits)}."
        )
    return "\n".join([*lines, ""])


def with_block(readme: str, marks: tuple[str, str], block: str) -> str:
    """A page with this block between a pair of marks. Raises ValueError if they are not there, once each."""
    first, last = marks
    if readme.count(first) != 1 or readme.count(last) != 1:
        raise ValueError(f"the marks {first} and {last} must be there once each")
    before, _, rest = readme.partition(first)
    _, _, after = rest.partition(last)
    return f"{before}{first}\n{block}{last}{after}"


def with_speed(readme: str, reports: list[dict]) -> str:
    """The README with everything that it says about speed."""
    readme = with_block(readme, CLAIM_MARKS, claim_block(reports))
    return with_block(readme, SPEED_MARKS, speed_block(reports))


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
        "stand before it. Bias and masks are measured in the first step of each group of sparse steps. A plan is "
        "made at the end.",
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
            "| peak MiB | bias again | times dense | peak MiB | masks anew | plan of a site |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in report["rows"]:
            times = [row.get(f"{name}_ms") for name in ("dense", "orders", "tail", "observe")]
            cells = [row["shape"], f"{row['length']}", f"{row['heads']}", *map(cell, times), cell(row.get("ratio"))]
            cells += [cell(row.get("peak_mib"), 0), cell(row.get("refresh_ms")), cell(row.get("refresh_ratio"), 3)]
            cells += [cell(row.get("refresh_peak_mib"), 0)]
            cells += [cell(row.get("look_ms")), cell(row.get("plan_ms"), 0)]
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
            "| grid | tokens | attention | orders | tail | rotation | in all | times attention | the first time |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in report["rows"]:
            times = [row.get(f"{name}_ms") for name in ("attention", "orders", "tail", "rotation", "all")]
            cells = [row["grid"], f"{row['length']}", *map(cell, times)]
            cells += [cell(row.get("ratio")), cell(row.get("first_ratio"))]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines if reports else [*lines, f"Nothing: {MISSING}.", ""]


def read(pattern: str) -> list[dict]:
    """The committed results whose file names match."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def render(reports: list[dict]) -> str:
    """Markdown: attention alone, a table per GPU and shape."""
    lines = [
        "# Attention alone",
        "",
        "From `bench/results/attention*.json`, which `python bench/attention.py` printed.",
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


def benchmarks_page() -> str:
    """docs/benchmarks.md, from the committed results."""
    lines = ["# Benchmarks", "", "Written by `python bench/report.py`. Do not edit.", ""]
    attention = [report for report in read("attention*.json") if report["benchmark"] == "attention"]
    lines += [*whole_run_tables(read("whole_run*.json")), render(attention)]
    lines += expected.expected_tables(read("kernel_code.json")[0], attention, read("attention_rounds*.json"))
    lines += cards.sent_tables([cards.read_card(path) for path in sorted(RESULTS.glob("cards/*.json"))])
    lines += [*step_tables(read("end_to_end*.json")), *calibration_tables(read("calibration*.json"))]
    lines += tiny_calibration_tables(read("tiny_calibration*.json"))
    return "\n".join(lines).rstrip() + "\n"


def kernels_page() -> str:
    """docs/kernels.md with its table of time and energy."""
    page = KERNELS.read_text(encoding="utf-8")
    return with_block(page, rounds.MARKS, rounds.energy_block(read("attention_rounds*.json")))


def main() -> int:
    TARGET.write_text(benchmarks_page(), encoding="utf-8")
    README.write_text(with_speed(README.read_text(encoding="utf-8"), read("whole_run*.json")), encoding="utf-8")
    KERNELS.write_text(kernels_page(), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)} and the figures of {README.name} and {KERNELS.name} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
