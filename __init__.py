"""PARO Attention for ComfyUI: the host's entry point. It imports nothing heavy until the host asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension that lists the pack's nodes (ComfyUI's V3 entry)."""
    from .nodes.extension import PAROExtension

    return PAROExtension()
