"""How a user's mistake reaches the user: one sentence, on the node itself and in the page's own message.

The page shows what `validate_inputs` answers only behind several clicks, and of an exception its class with the whole
module path: so the sentence is put on the node as well, and the exception is Python's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..paro_runtime.config.recipes import RecipeError
from ..paro_runtime.config.settings import SettingsError
from ..paro_runtime.host.language import for_user
from ..paro_runtime.host.status import status_line
from ..paro_runtime.plan.plan import PlanError


class CompareError(ValueError):
    """Something that cannot be compared; the message is one sentence that says what to do."""


MISTAKES = (PlanError, SettingsError, RecipeError, CompareError)
_wrong: set[str] = set()
"""Nodes that show a refusal: it has to go once the input is right, also where the host runs nothing of the node."""


def checked(node_id: str | None, check: Callable[[], object]) -> bool | str:
    """What `validate_inputs` answers: True, or the sentence of the mistake that `check` raises; the node shows it."""
    show = status_line(node_id)
    try:
        check()
    except MISTAKES as error:
        _wrong.add(node_id)
        show(str(error))
        return for_user(str(error))
    if node_id in _wrong:
        _wrong.discard(node_id)
        show(" ")  # the page takes an empty text for none
    return True


@contextmanager
def told(show: Callable[[str], None]) -> Iterator[None]:
    """Raises a mistake as ValueError, and shows its sentence."""
    try:
        yield
    except MISTAKES as error:
        show(str(error))
        raise ValueError(for_user(str(error))) from None
