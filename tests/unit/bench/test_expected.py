"""Times expected of cards that nobody measured, and the table of time and energy in docs/kernels.md."""

from __future__ import annotations

import pytest

from bench import expected, report, rounds
from bench.expected import CARDS, HOPPER, Card

CARD = Card("X", 89, 100, 2.0, {"16": 512, "int8": 2048})


def tile(slots: float) -> dict:
    return {"tile": "128x64 w8 st3", "slots": slots, "programs": 1, "registers": 200, "shared": 64.0}


def test_what_a_call_needs():
    """int8: 2 * 128 operations in INT8 and as many in 16 bits, 0.625 cycles an element; 12.8 slots are 0.1 cycles."""
    elements = expected.HEADS * expected.TOKENS**2 / 2
    issue, tensor = expected.times_of(tile(12.8), CARD, "int8", 0.5)
    assert issue == pytest.approx(elements * 0.1 / (100 * 2e6))
    assert tensor == pytest.approx(elements * 0.625 / (100 * 2e6))
    half = expected.times_of(tile(12.8), CARD, "int8", 0.5, heads=20)
    assert half == pytest.approx((issue / 2, tensor / 2))


def test_a_step_of_the_h200_is_what_its_page_says():
    """Cycles of 128 x 128 scores in FP8: 1,124 of issue slots, 1,024 of tensor cores."""
    (power,) = [each["power"] for each in report.read("attention_rounds_h200.json")]
    steps = expected.HEADS * expected.TOKENS**2 / 128**2 / HOPPER.multiprocessors
    needs = expected.times_of(tile(8.78), HOPPER, "fp8 gluon", 1.0)
    cycles = [ms * 1e-3 * HOPPER.boost * 1e9 / steps for ms in needs]
    assert cycles == pytest.approx([power["issue_cycles"], power["tensor_cycles"]], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "peak"),
    [
        ("RTX 3090", "16", 71), ("RTX 3090", "int8", 284), ("A100 SXM", "16", 312), ("A100 SXM", "int8", 624),
        ("RTX 4090", "16", 165.2), ("RTX 4090", "fp8", 330.3), ("RTX 4090", "int8", 660.6),
        ("L40S", "16", 366), ("L40S", "fp8", 733), ("RTX 5090", "16", 209.5), ("RTX 5090", "fp8", 419),
        ("RTX 5090", "int8", 838),
    ],
)  # fmt: skip
def test_rates_are_the_peaks_that_are_published(name, kind, peak):
    (card,) = [each for each in CARDS if each.name == name]
    assert card.rates[kind] * card.multiprocessors * card.boost / 1e3 == pytest.approx(peak, rel=0.01)


def record(slots: float) -> dict:
    tiles = {}
    for sm in (80, 86, 89, 90, 120):
        for precision in (*expected.PRODUCTS, "fp8 gluon", "int8 gluon"):
            for form in ("dense", "list", "list of 64 rows"):
                tiles[f"sm_{sm} D128 {precision} {form}"] = tile(slots)
    return {"3.6.0": {"tiles": tiles}}


def test_what_is_expected_is_what_measured_cards_took_longer():
    needs = expected.times_of(tile(12.8), HOPPER, "fp8", 1.0)
    row = {"shape": "wan720p", "heads": 40, "tail": False, "kept": 1.0, "kernel_ms": 2 * sum(needs)}
    triton, gluon = ({**row, "name": "paro fp8", "tile": tile} for tile in ("64 rows", "gluon, 128 rows"))
    rows = [triton, {**gluon, "kernel_ms": 3 * sum(needs)}, {**triton, "tail": True}, {**triton, "heads": 8}]
    measured = {"gpu": "NVIDIA H100 80GB", "rows": [*rows, {"shape": "wan720p", "heads": 40}]}
    page = expected.expected_tables(record(12.8), [measured, {**measured, "gpu": "NVIDIA B200"}], [])
    text, longest = "\n".join(page), sum(needs) / max(needs)
    assert f"2 measured calls of H100 and H200 (below) took {2 * longest:.2f} to {3 * longest:.2f} times" in text
    assert f"{2.5 * longest:.2f} in the median, and 2.00 to 3.00 times the sum of both" in text
    (line,) = [each for each in page if each.startswith("| RTX 4090 | int8_pv8 |")]
    ms = expected.times_of(tile(12.8), CARDS[2], "int8_pv8", 1.0)
    assert f"| tensor cores | {max(ms):.0f} | {2 * sum(ms):.0f} to {3 * sum(ms):.0f} |" in line
    assert not [each for each in page if each.startswith("| RTX 3090 | fp8")]


def test_the_page_of_the_kernels_has_its_table():
    page = report.KERNELS.read_text(encoding="utf-8")
    assert page == report.kernels_page(), "run bench/report.py"
    assert len(page.splitlines()) < 200
    row = {"precision": "fp8", "density": 0.1, "tail": True, "dim": 128, "ms": 2.04, "joules": 1.06}
    rows = [{**row, "run": 1, "ms": 9}] + [{**row, "run": 2, "variant": name} for name in ("old", "triton", "f")]
    rows[0]["variant"] = "old"
    head = {"gpu": "G", "length": 75600, "heads": 16, "torch": "1", "triton": "2", "date": "d", "commit": "c"}
    assert "| fp8 | 0.1, tail | 2.0 | 1.1 | 2.0 | 1.1 |" in rounds.energy_block([{**head, "rows": rows}]).splitlines()
