"""One line of text on a node, wherever ComfyUI runs with a server; nowhere else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from .language import for_user

log = logging.getLogger("paro")


def status_line(node_id: str | None) -> Callable[[str], None]:
    """A function that shows text on the node, in the user's language; without a node or a server it does nothing, and
    it raises nothing: what it would say is logged as well."""

    def show(text: str) -> None:
        # Not imported: where the host has no server running, importing it would pull in all of the web stack.
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if server is None or node_id is None:
            return
        try:
            server.send_progress_text(for_user(text), node_id)
        except Exception as error:  # another version of the host, or another pack's server
            log.debug("PARO: the node cannot show its line (%s: %s)", type(error).__name__, error)

    return show
