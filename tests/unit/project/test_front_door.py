"""The README and the pages of docs/: what they name is there, and what they say of stacking is what is tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from comfyui_paro.scripts import draw_pictures
from comfyui_paro.tests.host.compositions_all import COMPOSITIONS
from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_the_test_command_is_that_of_the_continuous_integration():
    (command,) = re.findall(r"^exec python3 (.+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"\npython {command}\n" in README.read_text(encoding="utf-8")


def test_what_is_said_of_stacking_is_what_is_tested():
    section = README.read_text(encoding="utf-8").split("## Beside other nodes")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (.+) \| (sparse|dense) \|$", section, re.MULTILINE))
    tested = {each.name: each.expected for each in COMPOSITIONS}
    assert len(rows) >= 8 and rows == {name: tested.get(name) for name in rows}


@pytest.mark.parametrize(("name", "draw"), [("icon", draw_pictures.icon), ("banner", draw_pictures.banner)])
def test_pictures_are_those_that_the_script_draws(name, draw):
    """Up to what another version of Pillow rounds elsewhere."""
    drawn = draw().convert("RGB")
    with Image.open(ROOT / "docs" / f"{name}.png") as committed:
        gap = ImageChops.difference(drawn, committed.convert("RGB"))
    assert max(ImageStat.Stat(gap).rms) < 4


def test_pictures_have_the_sizes_that_the_registry_asks_for():
    width, height = draw_pictures.ICON
    assert width == height <= 400
    width, height = draw_pictures.BANNER
    assert width * 9 == height * 21
