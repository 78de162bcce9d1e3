"""The compositions of PARO with what else users put on a model: one list, for the tests and for docs/composition.md.

Importing this module needs no host: what makes a composition imports it when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SPARSE, DENSE, UNTESTED = "sparse", "dense", "not testable here"
ORDERS = ("PARO before it", "PARO after it")


@dataclass(frozen=True)
class Composition:
    """One row, with exactly one of node, sampled and elsewhere; none where it is UNTESTED.

    made      how it is made, in Markdown.
    expected  SPARSE, DENSE or UNTESTED.
    why       the reason for the two others, and remarks.
    node      (bed, model) -> model: put on a model before PARO and after it; sampled by the bed.
    sampled   (bed, paro) -> latent: a whole run, `paro` patches a model, or leaves it alone for the comparison.
    elsewhere file and name of the test that shows it, where that is a test of its own.
    model     what the bed loads: `wan`, `flux`, or a case of `cases_image` and `cases_video`.
    steps, batch  of the bed's runs.
    changes   whether without PARO the result is another than that of the model alone.
    skips     whether it leaves out evaluations.
    passed    the beginning of the reason for which some calls are left to the host, or all where DENSE is expected.
    """

    group: str
    name: str
    made: str
    expected: str = SPARSE
    why: str = ""
    node: Callable[[Any, Any], Any] | None = None
    sampled: Callable[[Any, Callable[[Any], Any]], Any] | None = None
    elsewhere: str | None = None
    model: str = "wan"
    steps: int = 3
    batch: int = 1
    changes: bool = True
    skips: bool = False
    passed: str = ""

    @property
    def key(self) -> str:
        """Its name as a test's id."""
        return f"{self.group}: {self.name}".replace("`", "")


COMPOSITIONS: list[Composition] = []


def row(group: str, name: str, made: str, **fields: Any) -> None:
    """A composition without a function of its own here."""
    COMPOSITIONS.append(Composition(group, name, made, **fields))


def node(group: str, name: str, made: str, **fields: Any) -> Callable:
    """Decorates what puts another node on a model."""

    def add(function: Callable) -> Callable:
        row(group, name, made, node=function, **fields)
        return function

    return add


def sampled(group: str, name: str, made: str, **fields: Any) -> Callable:
    """Decorates a whole run."""

    def add(function: Callable) -> Callable:
        row(group, name, made, sampled=function, **fields)
        return function

    return add
