"""From what PARO Check shows to the page of benchmarks, and what is refused on the way."""

from __future__ import annotations

import json
import math

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.nodes.check import card as check_card
from comfyui_paro.nodes.check.check import Check
from comfyui_paro.nodes.check.measure import Row, Size
from comfyui_paro.nodes.check.text import check_text

from bench import cards, report

SHARING = "To share these times, copy the next line whole: it tells card, versions, call and times, and nothing else"

MACHINE = {
    "device": "cuda", "gpu": "NVIDIA GeForce RTX 4090", "memory": 23.6, "compute_capability": "8.9", "driver": "580.1",
    "comfyui": "0.33.0", "paro": "0.1.0", "torch": "2.11.0", "cuda": "13.0", "rocm": None, "triton": "3.6.0",
    "comfy_kitchen": None, "sageattention": "2.2.0", "python": "3.12", "system": "/home/me",
}  # fmt: skip
SIZE = Size(TokenLayout(0, (1, 128, 128)), 24, 128, torch.bfloat16)
ROWS = (
    Row("ComfyUI's attention now (pytorch)", "host", 1.0, 12.3456, 0.00123, 24),
    Row("attention now on this model (my_secret_nodes: run)", "host", 1.0, 11.0, 0.001, 24),
    Row("PARO with 30 % of blocks (int8_pv8)", "paro", 0.3, 4.5678, 0.4, 24),
    Row("SageAttention", "other", 1.0, reason="OSError: /home/me/sage.so"),
)
FOUND = Check(MACHINE, size=SIZE, rows=ROWS, others=("my_secret_nodes: run",), notes=("/home/me",))


def sent(found: Check) -> str:
    """The line as a user copies it."""
    lines = check_text(found).splitlines()
    return lines[lines.index(SHARING) + 1]


def test_what_is_shown_can_be_sent_and_stands_on_the_page(tmp_path, monkeypatch):
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "rtx-4090.json").write_text(sent(FOUND), encoding="utf-8")
    (card,) = [cards.read_card(path) for path in tmp_path.glob("cards/*.json")]
    assert (card["gpu"], card["triton"], card["tokens"], card["heads"]) == (MACHINE["gpu"], "3.6.0", 16384, 24)
    page = "\n".join(cards.sent_tables([card]))
    assert "## NVIDIA GeForce RTX 4090, sent in by a user" in page
    assert "16,384 tokens, 24 heads, D = 128, bfloat16; torch 2.11.0, triton 3.6.0" in page
    assert "| PARO with 30 % of blocks (int8_pv8) | 0.3 | 4.57 | 4.0e-01 |" in page.splitlines()
    assert "| ComfyUI's attention now (pytorch) | 1 | 12.3 | 1.2e-03 |" in page.splitlines()


def test_nothing_of_the_user_is_sent():
    line = sent(FOUND)
    assert "\n" not in line and "secret" not in line and "/home" not in line and "Sage" not in line


@pytest.mark.parametrize("changes", [{"rows": ROWS[3:]}, {"machine": {**MACHINE, "gpu": None}}, {"size": None}])
def test_without_a_time_or_a_gpu_there_is_nothing_to_send(changes):
    found = Check(**{"machine": MACHINE, "size": SIZE, "rows": ROWS, **changes})
    assert check_card.card_line(found) is None
    if found.size is not None:
        assert SHARING not in check_text(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: "{", "no JSON"),
        (lambda card: json.dumps([card]), "not a line of PARO Check"),
        (lambda card: json.dumps({**card, "kind": "other"}), "not a line of PARO Check"),
        (lambda card: json.dumps({**card, "gpu": 3}), "wrong or missing: gpu"),
        (lambda card: json.dumps({**card, "tokens": True, "heads": "24"}), "wrong or missing: tokens, heads"),
        (lambda card: json.dumps({**card, "rows": []}), "wrong or missing: rows"),
        (
            lambda card: json.dumps({**card, "rows": [{**card["rows"][0], "ms": math.nan}]}),
            "wrong or missing: rows",
        ),
        (lambda card: json.dumps({**card, "rows": [{**card["rows"][0], "ms": -1}]}), "wrong or missing: rows"),
    ],
)
def test_a_file_that_is_no_such_line_is_refused(tmp_path, change, message):
    path = tmp_path / "a.json"
    path.write_text(change(json.loads(sent(FOUND))), encoding="utf-8")
    with pytest.raises(ValueError, match=f"^a.json: {message}"):
        cards.read_card(path)


def test_only_plain_text_reaches_the_page():
    card = json.loads(sent(FOUND))
    card["gpu"] = "<script>x</script> | [a](http://b)\n# c" + "d" * 200
    (title,) = [line for line in cards.sent_tables([card]) if line.startswith("## ")]
    assert not set("<>|[]#\n") & set(title.removeprefix("## ")) and len(title) < 110


def test_without_files_the_page_says_so():
    assert "Nothing has been sent in yet." in cards.sent_tables([])


def test_both_sides_know_the_same_kind():
    assert cards.KIND == check_card.KIND and set(cards.NAMES + cards.NUMBERS) <= set(json.loads(sent(FOUND)))
    assert "# Measured by users" in report.benchmarks_page().splitlines()
