"""Start a ComfyUI checkout, in this process or as a server: for tests, the demo and screenshots.

As a script it is the launcher of the server: `python scripts/comfy_boot.py CHECKOUT [arguments of main.py]`.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def import_torchvision() -> None:
    """Import torchvision even where its build does not match torch's: ComfyUI needs only its transforms.

    A mismatched build declares shape functions for operators that it could not load. Those declarations, and only
    those, are skipped while it is imported.
    """
    import torch.library

    register = torch.library.register_fake

    def register_or_skip(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return (lambda function: function) if not args else args[0]
        return register(op, *args, **kwargs)

    torch.library.register_fake = register_or_skip
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = register


def boot(path: Path, device: str = "cpu") -> None:
    """Make `comfy` importable in this process, on "cpu" or "cuda", with PyTorch's attention.

    Call once, before any import: the host chooses its device when it is imported.
    """
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    import_torchvision()
    from comfy.cli_args import args

    # Read once, when comfy.model_management is first imported. The CPU default attention fails on broadcast masks.
    args.cpu = device == "cpu"
    args.use_pytorch_cross_attention = args.disable_xformers = True


if __name__ == "__main__":
    checkout = Path(sys.argv[1])
    sys.argv = [str(checkout / "main.py"), *sys.argv[2:]]
    sys.path[0] = str(checkout)
    os.chdir(checkout)
    import_torchvision()
    runpy.run_path(sys.argv[0], run_name="__main__")
