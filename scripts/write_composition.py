"""Write docs/composition.md from the list that the tests run: python scripts/write_composition.py (needs no host)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "composition.md"
HEAD = """# Composition

What becomes of PARO beside other nodes. Written by `python scripts/write_composition.py` from the list that
`tests/host/test_composition.py` runs; do not edit.

Every row but those marked otherwise is run in a real ComfyUI on the CPU, on a tiny model with random weights, without
PARO and with it (`strict`: a fallback is an error). With every block kept the result must be that without PARO up to
rounding (relative error below 1e-5). With blocks dropped every layer must be sparse, the result near (below 0.1: the
weights are random), the same every time, and a report without fallbacks; beside a node that changes nothing by itself
it must be that of PARO alone, to the bit. Where a row says *dense* the result must be
that without PARO to the bit. Nodes are put on the model before PARO and after it, and the order must not matter.
Afterwards the model without PARO must give the same bits as before. None of it says anything about speed.

| composition | how it is made | with PARO | remarks |
|---|---|---|---|
"""


def page(compositions: Iterable[Any]) -> str:
    """The page, in Markdown; compositions: as in `tests/host/compositions.py`."""
    lines, group = [], None
    for each in compositions:
        if each.group != group:
            group = each.group
            lines.append(f"| **{group}** | | | |")
        lines.append(f"| {each.name} | {each.made} | {each.expected} | {each.why} |")
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    import _checkout

    _checkout.register()
    from comfyui_paro.tests.host.compositions_all import COMPOSITIONS

    PAGE.write_text(page(COMPOSITIONS), encoding="utf-8")


if __name__ == "__main__":
    main()
