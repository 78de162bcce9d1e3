"""The language of the user whose prompt is being checked or executed.

It is what the page is set to (`Comfy.Locale`, which the host stores for every user once it was changed), else what the
browser asks for, as the page does. Both are known while the page's request is handled, and kept by prompt id for the
execution, which has a thread of its own. Everywhere else it is English.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from ..report.sentences import ENGLISH, told

log = logging.getLogger("paro")
SETTING = "Comfy.Locale"
KEPT_PROMPTS = 1024
"""Prompts in another language than English that are remembered: as many as may wait in a queue."""

_asked_in: ContextVar[str] = ContextVar("paro_language")
_by_prompt: OrderedDict[str, str] = OrderedDict()


def for_user(text: str) -> str:
    """The text in the user's language."""
    return told(text, _current())


def follow_language() -> None:
    """Learn the language of every prompt that comes in from now on; without a server there are none."""
    module = sys.modules.get("server")
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    app = getattr(server, "app", None)
    if app is None or app.frozen:
        return

    @module.web.middleware
    async def middleware(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        if request.method != "POST" or not request.path.endswith("/prompt"):
            return await handler(request)
        # A connection's next request is handled in the same context.
        before = _asked_in.set(language_of(server, request))
        try:
            return await handler(request)
        finally:
            _asked_in.reset(before)

    app.middlewares.append(middleware)
    server.add_on_prompt_handler(on_prompt)


def language_of(server: Any, request: Any) -> str:
    """Of the user who sends a request. Never raises: English is better than no picture."""
    try:
        settings = server.user_manager.settings.get_settings(request)
        chosen = settings.get(SETTING) or request.headers.get("Accept-Language", "").partition(",")[0].partition(";")[0]
        return chosen.strip() or ENGLISH
    except Exception as error:
        log.debug("PARO: the user's language is not known (%s: %s)", type(error).__name__, error)
        return ENGLISH


def on_prompt(data: dict[str, Any]) -> dict[str, Any]:
    """The host's handler of a prompt that was posted, called before it is checked."""
    language = _asked_in.get(ENGLISH)
    if not language.startswith(ENGLISH):
        if not data.get("prompt_id"):
            data["prompt_id"] = str(uuid.uuid4())
        _by_prompt[data["prompt_id"]] = language
        while len(_by_prompt) > KEPT_PROMPTS:
            _by_prompt.popitem(last=False)
    return data


def _current() -> str:
    asked = _asked_in.get(None)
    if asked is not None or not _by_prompt:
        return asked or ENGLISH
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return ENGLISH if context is None else _by_prompt.get(context.prompt_id, ENGLISH)
