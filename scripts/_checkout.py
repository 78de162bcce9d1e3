"""Make this checkout importable as the package `comfyui_paro`, whatever its folder is called.

Inside ComfyUI the host imports the folder under a name of its own; tests, benchmarks and scripts use this name.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "comfyui_paro"


def register() -> Path:
    """Register the checkout in `sys.modules` once and return its root folder."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = module
        spec.loader.exec_module(module)
    return ROOT
