"""docs/composition.md says what the tests run, and nothing else."""

import ast
from pathlib import Path

from comfyui_paro.scripts.write_composition import PAGE, page
from comfyui_paro.tests.host.compositions import DENSE, SPARSE, UNTESTED
from comfyui_paro.tests.host.compositions_all import COMPOSITIONS

HOST_TESTS = Path(__file__).resolve().parents[2] / "host"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(COMPOSITIONS), "python scripts/write_composition.py"


def test_every_row_has_one_test_or_says_why_not():
    for each in COMPOSITIONS:
        ways = [way for way in (each.node, each.sampled, each.elsewhere) if way]
        assert each.expected in (SPARSE, DENSE, UNTESTED), each.key
        assert len(ways) == (each.expected != UNTESTED), each.key
        assert each.why or each.expected == SPARSE, each.key
        assert "|" not in f"{each.name}{each.made}{each.why}", each.key
    keys = [each.key for each in COMPOSITIONS]
    assert len(set(keys)) == len(keys)


def test_tests_that_lie_elsewhere_are_there():
    for each in COMPOSITIONS:
        if each.elsewhere:
            file, name = each.elsewhere.split("::")
            tree = ast.parse((HOST_TESTS / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, each.elsewhere
