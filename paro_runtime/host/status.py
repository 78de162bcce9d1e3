"""One line of text on a node, wherever ComfyUI runs with a server; nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .language import for_user


def status_line(node_id: str | None) -> Callable[[str], None]:
    """A function that shows text on the node, in the user's language; without a node or a server it does nothing."""

    def show(text: str) -> None:
        # Not imported: where the host has no server running, importing it would pull in all of the web stack.
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if server is not None and node_id is not None:
            server.send_progress_text(for_user(text), node_id)

    return show
