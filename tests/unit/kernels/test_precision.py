"""A precision's numbers live in one place, and the host's code reads them there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from comfyui_paro.kernels.attention import launch_plan
from comfyui_paro.kernels.attention.reference import sparse_attention_reference
from comfyui_paro.kernels.attention.tiles import tile_for
from comfyui_paro.kernels.core import precision as precisions
from comfyui_paro.kernels.core.layout import Geometry
from comfyui_paro.kernels.core.precision import FORMATS, PRECISIONS, Format, Precision

from .cases import Case, make, relative_error

ROOT = Path(precisions.__file__).parents[2]
NEW = {
    "int6": Format(8, torch.int8, 31.0, 63.0, error_bound=0.1, multiplied_as="int8"),
    "e5m2": Format(8, torch.float8_e5m2, 57344.0, 57344.0, error_bound=0.2),
}


@pytest.fixture
def added(monkeypatch):
    for name, made in NEW.items():
        monkeypatch.setitem(FORMATS, name, made)


@pytest.mark.parametrize("qk, pv", [("int6", "16"), ("int8", "int6"), ("int8", "e5m2"), ("int6", "e5m2")])
def test_a_format_that_is_added_needs_no_other_code_of_the_host(added, qk: str, pv: str):
    """The reference rounds as it says, within its bound, and a launch is planned with its numbers."""
    precision = Precision(qk, pv)
    q, k, v, pattern, _ = make(Case("", grid=(2, 8, 13), suffix=5, tail=True, heads=2, kv_heads=2))
    exact = sparse_attention_reference(q, k, v, pattern, PRECISIONS["16bit"])
    error = relative_error(sparse_attention_reference(q, k, v, pattern, precision), exact)
    finer = relative_error(sparse_attention_reference(q, k, v, pattern, PRECISIONS["int8"]), exact)
    assert finer < error < precision.error_bound
    key = launch_plan.CallKey(
        1, 2, 1, 64, q.dtype, (9, 0), Geometry(0, (2, 8, 13), 5), precision, 64, True, False, True
    )
    plan, values = launch_plan.call_of(key), FORMATS[pv]
    assert launch_plan.storage_types(key)[:2] == (torch.int8, values.storage or torch.float16)
    assert plan.attention_options["PV"] == {"int6": "int8"}.get(pv, pv)
    assert plan.prepare_options["V_LEVELS"] == values.largest
    assert 2 ** plan.attention_options["P_LOG2"] == pytest.approx(values.largest_weight)
    assert plan.tile == tile_for((9, 0), 64, precision, 64, True)
    assert precision.needs_fp8 is (pv == "e5m2")


def _compared_names(source: str) -> list[str]:
    """Comparisons with the name of a format, in functions that no kernel compiler reads."""
    tree = ast.parse(source)
    compiled = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(each).partition("(")[0].endswith("jit") for each in node.decorator_list)
    ]
    inside = {id(node) for function in compiled for node in ast.walk(function)}
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and id(node) not in inside
        if any(isinstance(part, ast.Constant) and part.value in FORMATS for part in ast.walk(node))
    ]


def test_only_kernels_compare_names_of_formats():
    assert _compared_names('def f(p):\n    return p.qk != "16"') == ["p.qk != '16'"]
    assert not _compared_names('@triton.jit\ndef f(QK):\n    return QK == "16"')
    files = [path for top in ("kernels", "paro_runtime", "nodes") for path in (ROOT / top).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): _compared_names(path.read_text(encoding="utf-8")) for path in files}
    assert {name: compared for name, compared in found.items() if compared} == {}


@pytest.mark.parametrize(
    "name, rotated", [("16bit", False), ("int8", True), ("int8_pv8", True), ("fp8", True), ("int4", False)]
)
def test_a_plan_may_rotate_what_is_of_8_bits(name: str, rotated: bool):
    precision = PRECISIONS[name]
    assert (precision.rotated is not None) is rotated
    assert not rotated or precision.rotated == Precision(precision.qk, precision.pv, hadamard=True)
    assert not Precision("16", "16", hadamard=True).rotates


def test_4_bit_keys_take_half_the_memory_of_8_bit_ones_and_are_multiplied_as_those():
    """What `int4` is for: it is no faster anywhere."""

    def planned(name: str) -> launch_plan.Call:
        shape = (torch.bfloat16, (9, 0), Geometry(0, (2, 8, 13), 5), PRECISIONS[name], 64, False, False, True)
        return launch_plan.call_of(launch_plan.CallKey(1, 2, 1, 128, *shape))

    packed, whole = (planned(name).scratch.places["k"] for name in ("int4", "int8_pv8"))
    assert 2 * (packed[1] - packed[0]) == whole[1] - whole[0]
    assert planned("int4_pv4").attention_options["PV"] == "int8"
    assert planned("int4_pv4").tile == planned("int4").tile == planned("int8_pv8").tile
