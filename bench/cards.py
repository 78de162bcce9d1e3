"""What users measured with *PARO Check* and sent back (`bench/results/cards/*.json`), for `bench/report.py`.

Files come from strangers: everything is checked, and only plain text reaches the page.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

# As in `nodes/check/card.py`.
KIND = "paro check"
NAMES = ("gpu", "date", "torch", "triton", "paro", "comfyui", "dtype")
NUMBERS = ("tokens", "heads", "head_dim")
LONGEST = 80
NOT_PLAIN = re.compile(r"[^\w .,:;()%+'/-]")


def read_card(path: Path) -> dict:
    """One file. Raises ValueError, with the file's name and what is wrong, if it is not what *PARO Check* writes."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: no JSON: {error}") from error
    if not isinstance(card, dict) or card.get("kind") != KIND:
        raise ValueError(f"{path.name}: not a line of PARO Check")
    wrong = [name for name in NAMES if not isinstance(card.get(name), str)]
    # Triton and ComfyUI may be absent, and are null then.
    wrong = [name for name in wrong if name not in ("triton", "comfyui", "paro") or card.get(name) is not None]
    wrong += [name for name in NUMBERS if not (_is_number(card.get(name)) and card[name] > 0)]
    rows = card.get("rows")
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        wrong.append("rows")
    if wrong:
        raise ValueError(f"{path.name}: wrong or missing: {', '.join(wrong)}")
    return card


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return False
    numbers = _is_number(row.get("ms")) and _is_number(row.get("density"))
    return numbers and row["ms"] > 0 and (row.get("error") is None or _is_number(row["error"]))


def plain(text: str | None) -> str:
    """What of a text may stand in a cell: letters, digits and a few marks, one line, not long."""
    return NOT_PLAIN.sub("", text or "none")[:LONGEST]


def sent_tables(cards: list[dict]) -> list[str]:
    """Markdown: a table for each file."""
    lines = [
        "# Measured by users",
        "",
        "From `bench/results/cards/*.json`: what *PARO Check* measured on users' machines, as they sent it. Nobody of "
        "the project was there. Random inputs, one attention call, pre-pass included. Errors (relative L2 against "
        "exact dense attention) tell precisions apart; what drops blocks errs far more on these than on pictures.",
        "",
    ]
    if not cards:
        return [*lines, "Nothing has been sent in yet.", ""]
    for card in cards:
        versions = ", ".join(f"{name} {plain(card[name])}" for name in ("torch", "triton", "paro", "comfyui"))
        lines += [
            f"## {plain(card['gpu'])}, sent in by a user",
            "",
            f"{card['tokens']:,} tokens, {card['heads']} heads, D = {card['head_dim']}, {plain(card['dtype'])}; "
            f"{versions}, {plain(card['date'])}.",
            "",
            "| method | share of blocks | ms | error |",
            "|---|---|---|---|",
        ]
        for row in card["rows"]:
            error = "not measured" if row.get("error") is None else f"{row['error']:.1e}"
            lines.append(f"| {plain(row['name'])} | {row['density']:.2g} | {row['ms']:.3g} | {error} |")
        lines.append("")
    return lines
