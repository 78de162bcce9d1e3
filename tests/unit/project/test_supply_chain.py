"""What the pack depends on, ships, reads and starts is what its pages and its registry entry say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from comfyui_paro import paro_runtime

ROOT = Path(__file__).resolve().parents[3]
RUNTIME = [path for folder in ("kernels", "paro_runtime", "nodes") for path in sorted((ROOT / folder).rglob("*.py"))]
HOST = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_kitchen",
    "comfyui_version",
    "execution",
    "folder_paths",
    "nodes",
}
LIBRARIES = {"PIL": "pillow"}  # those whose module has another name than their package
NETWORK = {"aiohttp", "ftplib", "http", "requests", "smtplib", "socket", "socketserver", "ssl", "urllib", "webbrowser"}
UNSAFE_READERS = {"dbm", "marshal", "pickle", "shelve"}
STARTS_PROCESSES = {"paro_runtime/compiling/ahead.py", "nodes/check/machine.py"}
PLACEHOLDERS = {"<repository>", "<publisher>"}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(name: str) -> list[str]:
    """The lines of a file of requirements, without comments."""
    lines = (line.partition("#")[0].strip() for line in text(name).splitlines())
    return [line for line in lines if line]


def package(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 cannot read TOML")
    return tomllib.loads(text("pyproject.toml"))


def imports(path: Path) -> set[str]:
    """Top-level names of all absolute imports of a file, those within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def licences() -> dict[str, str]:
    """Package -> where it comes from, of docs/licences.md."""
    rows = re.findall(r"^\| ([\w.-]+) \| ([^|]+) \| ([^|]+) \|$", text("docs/licences.md"), re.MULTILINE)
    return {name: source for name, _, source in rows if name != "package" and set(name) != {"-"}}


def test_both_lists_of_dependencies_are_one():
    assert [each.replace("'", '"') for each in project()["project"]["dependencies"]] == requirements("requirements.txt")


def test_an_installation_replaces_neither_torch_nor_its_triton():
    wanted = requirements("requirements.txt")
    assert not {package(each) for each in wanted} & {"torch", "torchvision", "torchaudio", "triton"}
    assert all("win32" in each for each in wanted if package(each) == "triton-windows")
    assert all(re.search(r">=[\d.]+,<[\d.]+", each) for each in wanted), "a range has two ends"


def test_the_oldest_of_every_range_is_tested():
    """Those of other systems' packages are not to be had where the tests run."""
    job = text(".github/workflows/test.yml").partition("  oldest:")[2].partition("\n  docs:")[0]
    ranges = [each for each in requirements("requirements.txt") if "sys_platform" not in each]
    oldest = {re.sub(r">=([\d.]+),.*", r"==\1", each) for each in ranges}
    assert set(re.findall(r"[\w-]+==[\d.]+", job)) == oldest
    assert {each for each in re.findall(r"tests/\S+", job) if not each.endswith(".txt")} <= {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "unit").iterdir()
    }


def test_licences_are_of_what_is_used():
    listed = licences()
    for file in ("requirements.txt", "tests/requirements.txt"):
        assert {package(each) for each in requirements(file)} <= set(listed), file
    names = {package(each) for each in requirements("requirements.txt")}
    assert {name for name, source in listed.items() if source == "`requirements.txt`"} == names
    used = set().union(*map(imports, RUNTIME)) - set(sys.stdlib_module_names) - HOST
    assert {LIBRARIES.get(name, name) for name in used} == set(listed) - _tools(listed) - {"triton-windows"}


def _tools(listed: dict[str, str]) -> set[str]:
    return {name for name, source in listed.items() if source == "`tests/requirements.txt`"}


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_network_no_pickle_no_evaluated_text(path):
    names = imports(path)
    assert not names & (NETWORK | UNSAFE_READERS)
    assert "subprocess" not in names or path.relative_to(ROOT).as_posix() in STARTS_PROCESSES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert called not in ("eval", "exec", "__import__", "os.system", "os.popen", "torch.load"), node.lineno


def test_the_changelog_begins_with_this_version():
    assert re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)[1] == paro_runtime.VERSION


def test_the_registry_entry_is_whole():
    entry = project()
    fields = entry["tool"]["comfy"]
    assert set(re.findall(r"<\w+>", text("pyproject.toml"))) == PLACEHOLDERS
    assert fields["DisplayName"] and fields["PublisherId"] == "<publisher>"
    for picture in (fields["Icon"], fields["Banner"]):
        assert (ROOT / picture.partition("/<repository>/HEAD/")[2]).is_file(), picture
    assert {"Repository", "Documentation", "Bug Tracker"} == set(entry["project"]["urls"])
    assert (ROOT / fields["web"]).is_dir()


@pytest.mark.skipif(os.name == "nt", reason="the workflow runs on Linux")
@pytest.mark.parametrize(("publisher", "works"), [("someone", True), ("", False)])
def test_publishing_puts_in_where_from_and_who(tmp_path, publisher, works):
    (script,) = re.findall(r"run: \|\n((?: {10}.+\n)+)", text(".github/workflows/publish.yml"))
    (tmp_path / "pyproject.toml").write_text(text("pyproject.toml"), encoding="utf-8")
    environment = {**os.environ, "PUBLISHER": publisher, "GITHUB_REPOSITORY": "owner/name"}
    done = subprocess.run(["bash", "-e", "-c", textwrap.dedent(script)], cwd=tmp_path, env=environment)
    assert (done.returncode == 0) == works
    if works:
        made = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
        assert "https://raw.githubusercontent.com/owner/name/HEAD/docs/icon.png" in made and "<" not in _registry(made)


def _registry(made: str) -> str:
    return made.partition("[project.urls]")[2].partition("[tool.ruff]")[0]


def test_every_page_is_in_the_site_and_every_entry_is_a_page():
    entries = re.findall(r"^ +- [^:]+: (\S+\.md)$", text("mkdocs.yml"), re.MULTILINE)
    assert sorted(entries) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
