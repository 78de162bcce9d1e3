"""docs/architecture.md and CONTRIBUTING.md: the picture is that of the sources, and what they name is there."""

import re
from pathlib import Path

import pytest
from comfyui_paro.scripts import draw_architecture

ROOT = Path(__file__).resolve().parents[3]
PAGE, CONTRIBUTING = ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"
NAMED = re.compile(
    r"`(?:python )?((?:kernels|paro_runtime|nodes|scripts|tests|bench|calib_presets|locales|docs)/[\w./]*)"
)


def test_the_picture_is_that_of_the_sources():
    drawn = draw_architecture.picture(draw_architecture.imports())
    assert draw_architecture.PICTURE.read_text(encoding="utf-8") == drawn, "python scripts/draw_architecture.py"


def test_arrows_that_follow_from_others_are_left_out():
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert draw_architecture.without_shortcuts(graph) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert draw_architecture.rows_of(graph) == [["a"], ["b"], ["c"]]


def test_a_circle_cannot_be_drawn():
    with pytest.raises(ValueError, match="imports itself"):
        draw_architecture.rows_of({"a": {"b"}, "b": {"a"}})


@pytest.mark.parametrize("page", [PAGE, CONTRIBUTING], ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    names = NAMED.findall(page.read_text(encoding="utf-8"))
    assert len(names) > 10
    assert not [name for name in names if not (ROOT / name).exists()]


def test_every_folder_is_explained():
    table = PAGE.read_text(encoding="utf-8").split("## The folders")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([\w/]+)` \|", table, re.MULTILINE)) == set(draw_architecture.imports())
