"""Sentences for people, in English, and how they are told in another language.

Every sentence is English text: that is what is counted, compared, logged and saved. `told` gives what is shown in place
of it, by `locales/<language>/paro.json`, which has two parts. `said`: templates of `say`, by which sentences are put
together of others. `found`: templates of all that is plain text, such as reasons, mistakes and notes, which come from
every layer of the code; they are found by their words, the most exact first. Fields are told as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache, reduce
from pathlib import Path
from string import Formatter
from typing import Any

LOCALES = Path(__file__).resolve().parents[2] / "locales"
FILE = "paro.json"
ENGLISH = "en"
LONGEST = 1000
"""Characters of a plain text that is looked for among the templates: an error of another's may be of any length."""


class Sentence(str):
    """English text that remembers its template and fields; see `say`."""

    template: str
    fields: dict[str, Any]

    def shaped(self, text: str) -> str:
        """The text in another language, as this one's English is."""
        return text


class Clipped(Sentence):
    """The first line of another text, of at most `most` characters in whatever language."""

    most: int

    def shaped(self, text: str) -> str:
        return _cut(text, self.most)


def say(template: str, /, **fields: Any) -> Sentence:
    """`template.format(**fields)`. Templates are written out where `say` is called: so a test finds them all."""
    return _made(Sentence(template.format(**fields)), template, fields)


def joined(between: str, parts: Iterable[str]) -> Sentence:
    """Parts in a row, with what is the same in every language between them."""
    fields = {f"part{number}": part for number, part in enumerate(parts)}
    template = between.join(f"{{{name}}}" for name in fields)
    return _made(Sentence(template.format(**fields)), template, fields)


def listed(parts: Iterable[str]) -> str:
    """`a, b, c`; empty for no parts."""
    parts = list(parts)
    return reduce(lambda first, second: say("{first}, {second}", first=first, second=second), parts) if parts else ""


def clipped(text: str, most: int) -> Clipped:
    """The first line, of at most so many characters."""
    made = _made(Clipped(_cut(text, most)), "{text}", {"text": text})
    made.most = most
    return made


def told(text: str, language: str) -> str:
    """The text in a language such as `zh` or `zh-TW`; in English where there is no table of it."""
    table = _table(language) or _table(language.partition("-")[0])
    return str(text) if table is None else table.told(text)


class Table:
    """Translations: `said` and `found` as the file has them."""

    def __init__(self, said: dict[str, str], found: dict[str, str]) -> None:
        self._said = said
        exact_first = sorted(found, key=literal_length, reverse=True)
        self._found = [(_pattern(template), found[template]) for template in exact_first]

    def told(self, text: str) -> str:
        """The text in this language; what no template fits stays as it is."""
        if isinstance(text, Sentence):
            translation = self._said.get(text.template, text.template)
            return text.shaped(translation.format(**self._fields(text.fields)))
        for pattern, translation in self._found if len(text) <= LONGEST else ():
            match = pattern.fullmatch(text)
            if match:
                return translation.format(**self._fields(match.groupdict()))
        return text

    def _fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {name: self.told(value) if isinstance(value, str) else value for name, value in fields.items()}


def literal_length(template: str) -> int:
    """Characters of a template outside of its fields."""
    return sum(len(words) for words, *_ in Formatter().parse(template))


def _made(sentence: Any, template: str, fields: dict[str, Any]) -> Any:
    sentence.template, sentence.fields = template, fields
    return sentence


def _cut(text: str, most: int) -> str:
    text = (text.splitlines() or [""])[0]
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def _pattern(template: str) -> re.Pattern[str]:
    """Of the texts that a template makes, with its fields as groups."""
    parts, names = [], set()
    for words, name, *_ in Formatter().parse(template):
        parts.append(re.escape(words))
        if name is not None:
            parts.append(f"(?P={name})" if name in names else f"(?P<{name}>.+?)")
            names.add(name)
    return re.compile("".join(parts), re.DOTALL)


@lru_cache(maxsize=16)
def _table(language: str) -> Table | None:
    """None for English and for a language without a file. The language may come from a request: it is no path."""
    if language == ENGLISH or not re.fullmatch(r"[A-Za-z]+(-[A-Za-z]+)?", language):
        return None
    try:
        found = json.loads((LOCALES / language / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Table(found["said"], found["found"])
