"""A check's measured times and steps as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..compare.compare import INK, PAPER
from .check import Check, Outlook
from .text import now_of, row_text, steps_line, unmeasured

if TYPE_CHECKING:
    from PIL import ImageDraw

# Told apart also without red-green vision (Okabe and Ito's palette), and by their names.
COLOURS = {"host": (170, 170, 170), "other": (86, 180, 233), "paro": (230, 159, 0)}
DENSE, SPARSE = COLOURS["host"], COLOURS["paro"]
FAINT = (150, 150, 156)
WIDTH, MARGIN, LINE = 720, 16, 22
BAR, GAP = 14, 14


def check_chart(check: Check) -> torch.Tensor:
    """A bar of milliseconds for each method, and a cell for each step of the run: float32 `[1, H, WIDTH, 3]`, 0..1."""
    import numpy as np
    from PIL import Image, ImageDraw  # the host's own dependency; only pictures need it

    steps = 0 if check.outlook is None else LINE + BAR + 2 * GAP
    measured, rest = [row for row in check.rows if row.ms is not None], unmeasured(check.rows)
    height = (
        2 * MARGIN + LINE * (2 if measured else 1) + GAP + len(measured) * (LINE + BAR + GAP) + len(rest) * LINE + steps
    )
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(image)
    y = MARGIN
    _write(draw, y, _title(check), INK)
    if measured:
        y += LINE
        _write(draw, y, "on random inputs; errors are relative L2 against exact dense attention", FAINT)
    y += LINE + GAP
    longest, now = max((row.ms for row in measured), default=1.0), now_of(check.rows)
    for row in measured:
        _write(draw, y, f"{row.name}: {row_text(row, now)}", INK)
        end = MARGIN + max(2, round((WIDTH - 2 * MARGIN) * row.ms / longest))
        draw.rectangle((MARGIN, y + LINE, end, y + LINE + BAR - 1), fill=COLOURS[row.kind])
        y += LINE + BAR + GAP
    for line in rest:
        _write(draw, y, line, FAINT)
        y += LINE
    if check.outlook is not None:
        _steps(draw, y + GAP, check.outlook)
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]


def _title(check: Check) -> str:
    where = check.machine["gpu"] or f"no GPU ({check.machine['device']})"
    size = check.size
    if size is None:
        return where
    return f"{where}: ms per attention call, {size.layout.length:,} tokens, {size.heads} heads of {size.head_dim}"


def _steps(draw: ImageDraw.ImageDraw, y: int, run: Outlook) -> None:
    _write(draw, y, steps_line(run), INK)
    width = (WIDTH - 2 * MARGIN) / len(run.dense)
    space = 2 if width > 6 else 0
    for step, dense in enumerate(run.dense):
        left, right = MARGIN + round(step * width), MARGIN + round((step + 1) * width) - 1 - space
        draw.rectangle((left, y + LINE, max(left, right), y + LINE + BAR - 1), fill=DENSE if dense else SPARSE)


def _write(draw: ImageDraw.ImageDraw, y: int, text: str, ink: tuple[int, int, int]) -> None:
    """A line, cut where the picture ends."""
    from PIL import ImageFont

    try:
        font = ImageFont.load_default(15)
    except TypeError:  # Pillow before 10.1 has one size
        font = ImageFont.load_default()
    room, shown = WIDTH - 2 * MARGIN, text
    while draw.textlength(shown, font) > room:
        text = text[:-1]
        shown = f"{text.rstrip()}..."
    draw.text((MARGIN, y), shown, ink, font)
