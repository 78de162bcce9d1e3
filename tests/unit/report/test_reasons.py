"""The table of reasons is complete: every reason that the code can give has words and a hint, and every entry a use."""

import ast
from pathlib import Path

from comfyui_paro.paro_runtime.compiling.readiness import COMPILING
from comfyui_paro.paro_runtime.report import reasons
from comfyui_paro.paro_runtime.report.reasons import NOT_ON_IT, OFF, hint_of, known

PACK = Path(reasons.__file__).parents[2]


def _strings(node: ast.AST | None) -> set[str]:
    """The strings of several words that an expression may give, with `7`, or a layer, for what is filled in."""
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) and " " in node.value else set()
    if isinstance(node, ast.JoinedStr):
        filled = [
            part.value if isinstance(part, ast.Constant) else "double.0.0" if "site" in ast.unparse(part) else "7"
            for part in node.values
        ]
        return {"".join(filled)}
    return set().union(*map(_strings, ast.iter_child_nodes(node))) if node is not None else set()


def _counted() -> set[str]:
    """Arguments of `count`, `decline` and `WhyDense`."""
    found = {"calibrating"}
    for path in (path for folder in ("paro_runtime", "nodes") for path in (PACK / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = getattr(node, "func", None)
            name = getattr(function, "attr", getattr(function, "id", None))
            if isinstance(node, ast.Call) and name in ("count", "decline", "WhyDense"):
                found = found.union(*map(_strings, node.args))
    return found


RETURNING = {
    "paro_runtime/run/session.py": {"_find_unsuitable", "too_short_to_drop"},
    "paro_runtime/run/attempt.py": {"not_finite"},
    "nodes/check/check.py": {"_by_reference"},
    "paro_runtime/compiling/self_check.py": {"self_check", "_check"},
    "paro_runtime/host/attention_call.py": {"key_bias", "_read"},
    "paro_runtime/host/claims.py": {"_recording", "end"},
    "paro_runtime/host/patching.py": {"patch_model"},
    "paro_runtime/host/wrappers.py": {"outer_sample"},
    "kernels/core/support.py": {"triton_reason"},
}


def _returned() -> set[str]:
    """Strings of the functions that give reasons, and of all families with their constants."""
    files = {PACK / name: names for name, names in RETURNING.items()}
    files |= dict.fromkeys((PACK / "paro_runtime/host/families").glob("*.py"))
    found = set()
    for path, names in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert names is None or names <= functions.keys(), path
        inside = [tree] if names is None else [functions[name] for name in names]
        for node in (node for each in inside for node in ast.walk(each)):
            target = getattr(getattr(node, "targets", [None])[0], "id", "")
            if (
                isinstance(node, ast.Return)
                or target in ("reason", "exact")
                or (target.isupper() and target != "FAMILY")
            ):
                found |= _strings(node.value)
    return {text for text in found if text.count(" ") > 2}  # others are titles


REST = {
    COMPILING,
    reasons.NO_CALL,
    reasons.SKIPPED,
    OFF,
    NOT_ON_IT,
    "the run could not begin (E: 7)",
    "RuntimeError: 7",
}
REST |= {"no plan: it was dropped, 7", "no plan: it could not be made (E: 7)", "calibration: OutOfMemoryError: 7"}
REST |= {"standing before another attention: E: 7"}
REST |= {"double.0.0: OutOfMemoryError: 7", "the end of an evaluation: E: 7", "double.0.0 is not in the plan"}
"""Made of parts, or not counted."""


def test_every_reason_has_a_hint():
    found = _counted() | _returned() | REST
    assert len(found) > 55
    assert not [reason for reason in sorted(found) if known(reason) is None]
    # One that nobody foresaw is told to be reported.
    assert known("gremlins") is None and hint_of("gremlins") == "see the console, and report it"


def test_every_entry_of_the_table_is_for_something():
    found = _counted() | _returned() | REST
    used = {known(reason).pattern for reason in found if known(reason)}
    assert [entry.pattern for entry in reasons.REASONS if entry.pattern not in used] == []
    assert all(entry.hint and len(entry.hint) <= 70 for entry in reasons.REASONS)
