"""No file over 400 lines, no function of host code over 60, no signature over 10 parameters, but for the lists below.

An entry that is no longer needed fails as well, so that the lists only grow shorter.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(path for top in ("kernels", "paro_runtime", "nodes") for path in (ROOT / top).rglob("*.py"))
LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 10

LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "nodes/calibrate.py::define_schema": "a list of inputs, one after the other",
    "nodes/settings.py::define_schema": "a list of inputs, one after the other",
}
WIDE_SIGNATURES = {
    "kernels/attention/api.py::attention_operator": "torch's operators take tensors and numbers, no objects",
    "nodes/calibrate.py::execute": "ComfyUI hands every input over as an argument",
    "nodes/compare/node.py::execute": "ComfyUI hands every input over as an argument",
    "paro_runtime/host/attention_call.py::_read": "ComfyUI's attention functions have as many arguments",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of host code: kernels (`@triton.jit`, `@gluon.jit`) are compiled as a whole and take what they read."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not any(ast.unparse(each).partition("(")[0].endswith("jit") for each in node.decorator_list):
            yield node


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without `self` and `cls`; `*args` and `**kwargs` count as one each."""
    given = function.args
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    own = named[:1] in (["self"], ["cls"])
    return len(named) - own + (given.vararg is not None) + (given.kwarg is not None)


def over(limit: int, measure) -> set[str]:
    """`file::function` of every function that `measure` gives more than `limit` for."""
    return {
        f"{name_of(path)}::{function.name}"
        for path in FILES
        for function in functions(path.read_text(encoding="utf-8"))
        if measure(function) > limit
    }


def test_files_are_short():
    long = {name_of(path) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > LINES}
    assert long == set(LONG_FILES)


@pytest.mark.parametrize(
    ("limit", "measure", "listed"),
    [(FUNCTION_LINES, lines, LONG_FUNCTIONS), (PARAMETERS, parameters, WIDE_SIGNATURES)],
    ids=["lines", "parameters"],
)
def test_functions_are_short_and_take_little(limit, measure, listed):
    assert over(limit, measure) == set(listed)


def test_what_is_measured():
    source = (
        "@triton.jit(debug=True)\ndef kernel(a): ...\nclass A:\n    def f(self, a, /, b, *c, d, **e):\n        ...\n"
    )
    (found,) = functions(source)
    assert (found.name, lines(found), parameters(found)) == ("f", 2, 5)
