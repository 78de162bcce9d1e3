"""Everything that people are told has a translation with the same fields, and every translation is of something."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from string import Formatter

import pytest
from comfyui_paro.paro_runtime.report import sentences
from comfyui_paro.paro_runtime.report.reasons import REASONS, layer_words, not_used, plain, stopped, words_of
from comfyui_paro.paro_runtime.report.sentences import LOCALES, Table, clipped, joined, listed, say, told
from comfyui_paro.tests.unit.report import test_reasons, test_verdict

PACK = Path(sentences.__file__).parents[2]
LANGUAGES = sorted(path.parent.name for path in LOCALES.glob("*/paro.json"))
TELLING = ("note", "PlanError", "SettingsError", "RecipeError", "CompareError", "Unavailable", "Method", "part", "show")
TELLING += ("on_status", "between", "_not_measured", "Names", "Figures", "_say")
"""Functions and classes whose arguments reach people."""
TOLD_ELSEWHERE = re.compile(
    r"7|paro|other|host|7: 7|RuntimeError: 7|OutOfMemoryError: 7|SageAttention|7 x 7| |torch\b.*"
)
"""Arguments of those that are no sentences, or are errors of the code, which stay as they are."""


@cache
def _files(*folders: str) -> list[ast.AST]:
    paths = (path for folder in folders for path in sorted((PACK / folder).rglob("*.py")))
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def _name(call: ast.Call) -> str | None:
    return getattr(call.func, "attr", getattr(call.func, "id", None))


@cache
def _templates() -> set[str]:
    """The first argument of every call of `say`."""
    calls = [node for file in _files("nodes", "paro_runtime") for node in ast.walk(file) if isinstance(node, ast.Call)]
    templates = [call.args[0] for call in calls if getattr(call.func, "id", None) == "say"]
    assert all(isinstance(each, ast.Constant) for each in templates), "a template that is not written out"
    return {each.value for each in templates}


def _text(node: ast.AST, beginnings: dict[str, str] | None = None) -> str | None:
    """A string's text with 7 for what is filled in, unless that is one of the beginnings, by variable."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        names = (ast.unparse(part.value) if isinstance(part, ast.FormattedValue) else "" for part in node.values)
        parts = zip(node.values, names, strict=True)
        return "".join(p.value if isinstance(p, ast.Constant) else (beginnings or {}).get(n, "7") for p, n in parts)
    return None


def _beginnings(file: ast.AST) -> dict[str, str]:
    """Texts of the variables that sentences begin with."""
    assigned = (node for node in ast.walk(file) if isinstance(node, ast.Assign))
    return {
        name: _text(node.value) for node in assigned if (name := ast.unparse(node.targets[0])) in ("named", "others")
    }


@cache
def _texts() -> set[str]:
    """Every string of the code and of the recipes, and the sentences of the page on troubleshooting."""
    files = [(file, _beginnings(file)) for file in _files("nodes", "paro_runtime", "kernels")]
    found = {_text(node, beginnings) for file, beginnings in files for node in ast.walk(file)} - {None}
    found = {text for text in found if "\n" not in text}
    found |= {text.removeprefix("plan: ").removeprefix("plan 7: ") for text in found}
    found |= set(re.findall("`([^`]+)`", (PACK / "docs" / "troubleshooting.md").read_text(encoding="utf-8")))
    schema = json.loads((PACK / "calib_presets" / "schema.json").read_text(encoding="utf-8"))
    return found | set(schema["properties"]["evidence"]["enum"])


@cache
def _plain() -> set[str]:
    """What reaches people as plain text: reasons and their hints, and what is handed to TELLING."""
    found = {words_of(reason) for reason in test_reasons._counted() | test_reasons._returned() | test_reasons.REST}
    found |= {entry.hint for entry in REASONS}
    for file in _files("nodes", "paro_runtime"):
        for call in (node for node in ast.walk(file) if isinstance(node, ast.Call) and _name(node) in TELLING):
            given = (*call.args, *(keyword.value for keyword in call.keywords))
            found |= {_text(each, _beginnings(file)) for each in given} - {None}
    return {text for text in found if not TOLD_ELSEWHERE.fullmatch(text)}


def _fields(template: str, formats: bool = True) -> set:
    return {(name, form if formats else "") for _, name, form, _ in Formatter().parse(template) if name is not None}


def _file(language: str) -> dict[str, dict[str, str]]:
    return json.loads((LOCALES / language / "paro.json").read_text(encoding="utf-8"))


def test_chinese_is_there():
    assert "zh" in LANGUAGES and len(_templates()) > 150 and len(_plain()) > 150


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_template_has_a_translation_and_every_translation_a_template(language):
    translated = set(_file(language)["said"])
    assert translated - _templates() == set() and _templates() - translated == set()


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_field_is_lost_or_added(language):
    file = _file(language)
    pairs = [*file["said"].items(), *file["found"].items()]
    assert [english for english, other in pairs if _fields(english) != _fields(other) or not other.strip()] == []
    # What is found in a text is text: there is nothing to format.
    assert not [english for english in file["found"] if any(form for _, form in _fields(english))]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_plain_sentence_has_a_translation(language):
    assert sorted(text for text in _plain() if told(text, language) == text) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_translation_of_a_plain_sentence_is_of_one(language):
    texts = _texts() | _plain()
    found = _file(language)["found"]
    assert [english for english in found if not any(map(sentences._pattern(english).fullmatch, texts))] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_template_finds_its_own_sentences(language):
    """Of the templates that fit a text the right one is taken: each of two fields keeps what was in it."""
    found = _file(language)["found"]
    table = Table({}, found)
    for english, other in found.items():
        values = {name: f"<{name}>" for name, _ in _fields(english)}
        assert table.told(english.format(**values)) == other.format(**values), english


ENGLISH = re.compile(r"(?<![\w./])[a-z]{3,}(?![\w./])")
NAMES = {
    "token",
    "wan",
    "cpu",
    "cuda",
    "dense",
    "blocks",
    "backend",
    "auto",
    "custom",
    "calibrate",
    "steps",
    "bit",
    "vace",
    "double",
}
"""Words that Chinese sentences have too: of inputs, options and models."""


def _runs() -> list:
    base = test_verdict.run()
    timing = test_verdict.Timing
    return [
        base,
        test_verdict.by_triton(base, timing(1.9, 2), expected_gain=(1.6, 2.0)),
        test_verdict.by_triton(
            base, timing(1.9, 1, first=True), fallbacks=[("double.0.0: the result is not finite", 2)]
        ),
        test_verdict.by_triton(base, timing(0.8, 2), tail_seconds=1.0),
        test_verdict.by_triton(base, expected_gain=(1.1, 1.1), sites_routed=1, sites_rotated=2, precision="int8"),
        replace(base, facts=replace(base.facts, raised_from=0.2)),
        test_verdict.run(layouts=[test_verdict.TINY]),
        test_verdict.run(layouts=[test_verdict.LAYOUT, test_verdict.SMALLER]),
        test_verdict.run(test_verdict.Settings(dense_steps=9)),
        test_verdict.run(test_verdict.Settings(dense_steps=1, calibrate=False)),
        test_verdict.run(test_verdict.Settings(dense_steps=1, dense_blocks="90-95")),
        test_verdict.run(test_verdict.Settings(dense_steps=1), [1.0, 0.75], time_gone=lambda sigma: 1 - sigma),
    ]


def test_a_report_is_told_in_chinese():
    for report in _runs():
        for text in (report.text(), report.status()):
            shown = told(text, "zh")
            left = set(ENGLISH.findall(re.sub(r"\([a-z_]+\)", "", shown))) - NAMES
            assert not left, (left, shown)
            # The figures are the same, in whatever order.
            figures = r"\d+(?:\.\d+)?"
            assert sorted(re.findall(figures, shown)) == sorted(re.findall(figures, text)), (shown, text)
    assert (
        told(not_used("PARO is switched off"), "zh") == "未使用：PARO 已关闭；请在“PARO 模型补丁”中打开启用 (enabled)"
    )
    assert told(stopped(2, 20), "zh").startswith("未完成：")


def test_a_sentence_is_its_english_text():
    """Counted, compared, saved and copied as any other text."""
    made = say("{count} of {steps} sparse", count=3, steps=say("{count} steps", count=20))
    assert made == "3 of 20 steps sparse" and {made: 1}["3 of 20 steps sparse"] == 1
    assert json.loads(json.dumps({"verdict": made})) == {"verdict": "3 of 20 steps sparse"}
    assert type(told(made, "en")) is str and told(made, "en") == made
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert copied == made and copied.template == made.template


def test_a_table_tells_templates_fields_and_plain_text():
    table = Table(
        {"{count} of {steps} sparse": "{steps}:{count}", "{first}, {second}": "{first}/{second}"},
        {"{count} steps": "<{count}>", "{count} steps back": "back {count}", "dense": "d"},
    )
    assert table.told(say("{count} of {steps} sparse", count=3, steps="20 steps")) == "<20>:3"
    assert table.told("7 steps back") == "back 7" and table.told("dense") == "d" and table.told("denser") == "denser"
    assert table.told(joined("\n", ("dense", say("{a} new", a="dense")))) == "d\nd new"
    assert table.told(listed(("dense", "x", "9 steps"))) == "d/x/<9>" and listed(()) == ""
    # A name in braces is no field, and what is cut is cut in the other language.
    assert table.told(say("{count} of {steps} sparse", count="{steps}", steps="{0}")) == "{0}:{steps}"
    assert clipped("1234567 steps", 9) == "1234567…" and table.told(clipped("1234567 steps", 6)) == "<1234…"


def test_unknown_languages_are_english():
    for language in ("", "en", "en-US", "xx", "../zh", "zh/../zh"):
        assert told("nothing to do", language) == "nothing to do", language
    assert told("nothing to do", "zh-CN") == told("nothing to do", "zh") == "无需处理"


def test_layers_are_told_too():
    assert told(layer_words("double.3.1"), "zh") == "double 第 3 层的第 2 个注意力"
    assert plain(say("{count} steps", count=1)).template == "{count} steps"
