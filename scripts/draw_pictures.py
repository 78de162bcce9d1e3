"""Draw docs/icon.png and docs/banner.png, and docs/front.png from what the demo left behind.

python scripts/draw_pictures.py [--demo FOLDER]    (FOLDER: what `python scripts/demo.py --out FOLDER` wrote)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat

DOCS = Path(__file__).resolve().parent.parent / "docs"
ICON, BANNER = (400, 400), (1260, 540)  # the registry's: square up to 400 pixels, and 21:9
PAPER, INK, FAINT = (24, 24, 27), (228, 228, 231), (161, 161, 170)
KEPT, POOLED = (240, 228, 66), (58, 58, 66)
AXES = (4, 3)  # the picture's toy grid: twelve tokens, each looking along the second axis
FINER = 4  # drawn so many times larger, then reduced


def attention(reordered: bool) -> list[list[bool]]:
    """Which of the twelve tokens looks at which: blocks on the diagonal in one order, scattered in the other."""
    first, second = AXES
    ranks = range(first * second)
    groups = [rank // second if reordered else rank % first for rank in ranks]
    return [[groups[row] == groups[column] for column in ranks] for row in ranks]


def draw_matrix(draw: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, cells: list[list[bool]]) -> None:
    """A square of cells, `side` pixels wide, with a gap of a sixth of a cell between them."""
    step = side / len(cells)
    for row, line in enumerate(cells):
        for column, kept in enumerate(line):
            left, top = corner[0] + column * step, corner[1] + row * step
            box = (left + step / 12, top + step / 12, left + step * 11 / 12, top + step * 11 / 12)
            draw.rounded_rectangle(box, radius=step / 6, fill=KEPT if kept else POOLED)


def icon() -> Image.Image:
    """The reordered attention map alone, on a rounded square. RGBA."""
    size = ICON[0] * FINER
    image = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, size - 1, size - 1), radius=size // 8, fill=PAPER)
    draw_matrix(draw, (size // 8, size // 8), size * 3 // 4, attention(reordered=True))
    return image.resize(ICON, Image.LANCZOS)


def banner() -> Image.Image:
    """Name and purpose above, the attention map before and after reordering below. RGB."""
    width, height = (side * FINER for side in BANNER)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    side, top = height * 5 // 9, height * 2 // 9
    before, after = width * 45 // 100, width * 75 // 100
    draw_matrix(draw, (before, top), side * 3 // 4, attention(reordered=False))
    draw_matrix(draw, (after, top), side * 3 // 4, attention(reordered=True))
    middle, tip = top + side * 3 // 8, after - width // 50
    tail = before + side * 3 // 4 + width // 50
    draw.line((tail, middle, tip - width // 80, middle), fill=INK, width=height // 90)
    back, half = tip - width // 60, height // 40
    draw.polygon([(tip, middle), (back, middle - half), (back, middle + half)], INK)
    under = top + side * 3 // 4 + height // 36
    for left, text in ((before, "one head's attention"), (after, "the same, tokens reordered")):
        draw.text((left, under), text, font=ImageFont.load_default(height // 27), fill=FAINT)
    left = width // 20
    draw.text((left, height * 25 // 100), "PARO", font=ImageFont.load_default(height * 2 // 9), fill=INK)
    for number, text in enumerate(("Sparse attention for image and", "video generation in ComfyUI")):
        spot = (left, height * (52 + 7 * number) // 100)
        draw.text(spot, text, font=ImageFont.load_default(height // 19), fill=FAINT)
    return image.resize(BANNER, Image.LANCZOS)


def frames(path: Path) -> list[Image.Image]:
    """The grey frames of an animated picture."""
    with Image.open(path) as clip:
        found = []
        for number in range(clip.n_frames):
            clip.seek(number)
            found.append(clip.convert("L"))
    return found


def front(demo: Path) -> Image.Image:
    """The frame of the demo's clip that differs most: dense, PARO, and four times the difference. L."""
    pairs = list(zip(frames(demo / "dense.webp"), frames(demo / "paro.webp"), strict=True))
    gaps = [ImageChops.difference(*pair) for pair in pairs]
    worst = max(range(len(gaps)), key=lambda number: ImageStat.Stat(gaps[number]).sum2[0])
    titles = ("dense", "PARO", "difference x4")
    panels = [*pairs[worst], gaps[worst].point(lambda value: min(255, 4 * value))]
    side, gap, head = 400, 12, 36
    image = Image.new("L", (3 * side + 2 * gap, side + head), 255)
    draw = ImageDraw.Draw(image)
    for number, (title, panel) in enumerate(zip(titles, panels, strict=True)):
        left = number * (side + gap)
        draw.text((left, 6), title, font=ImageFont.load_default(22), fill=0)
        image.paste(panel.resize((side, side), Image.NEAREST), (left, head))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder that scripts/demo.py wrote")
    args = parser.parse_args()
    icon().save(DOCS / "icon.png", optimize=True)
    banner().save(DOCS / "banner.png", optimize=True)
    if args.demo:
        front(args.demo).save(DOCS / "front.png", optimize=True)


if __name__ == "__main__":
    main()
