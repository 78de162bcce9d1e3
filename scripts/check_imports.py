"""Check which folder imports which by the rules in pyproject.toml: `python scripts/check_imports.py`.

The linter reads sources and runs none of them, so it needs neither a host nor a GPU. The checkout goes under the name
that the rules use, whatever the folder is called.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _checkout
from importlinter.cli import lint_imports


def main() -> int:
    """0 where every rule is kept, 1 where one is broken, after what was found was printed."""
    root = _checkout.register()
    return lint_imports(config_filename=str(root / "pyproject.toml"), no_cache=True, no_logo=True)


if __name__ == "__main__":
    raise SystemExit(main())
