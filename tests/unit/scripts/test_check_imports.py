"""`scripts/check_imports.py` on a copy of the sources: every rule in pyproject.toml finds the import that breaks it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("bench", "kernels", "nodes", "paro_runtime")
BREAKS = {
    "The benchmarks use the nodes": ("kernels/core/layout.py", "from ...paro_runtime.plan import orders"),
    "The folders of kernels/ point one way": ("kernels/core/layout.py", "from ..pooling import reference"),
    "The folders of paro_runtime/ point one way": (
        "paro_runtime/plan/orders.py",
        "def later():\n    from ..run import policy",
    ),
    "No circles": ("nodes/schema.py", "from .compare import node"),
    "Only nodes/ and paro_runtime/host/ know ComfyUI": ("paro_runtime/run/policy.py", "import comfy.samplers"),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    (folder / "scripts").mkdir()
    for name in ("pyproject.toml", "__init__.py", "scripts/_checkout.py", "scripts/check_imports.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def check(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "scripts/check_imports.py"], cwd=folder, capture_output=True, text=True)


def broken(output: str) -> list[str]:
    """Names of the broken rules; the linter breaks long lines."""
    joined = " ".join(output.split("Broken contracts")[0].split())
    return [rule for rule in BREAKS if "BROKEN" in joined.split(rule, 1)[1].split("KEPT")[0]]


def test_every_rule_is_kept(copy):
    done = check(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept, 0 broken" in done.stdout


@pytest.mark.parametrize("rule", BREAKS)
def test_an_import_that_breaks_a_rule_is_found(copy, rule):
    name, line = BREAKS[rule]
    path = copy / name
    before = path.read_text(encoding="utf-8")
    path.write_text(f"{before}\n\n{line}\n", encoding="utf-8")
    try:
        done = check(copy)
    finally:
        path.write_text(before, encoding="utf-8")
    assert done.returncode == 1, done.stdout + done.stderr
    assert rule in broken(done.stdout), done.stdout
