"""Check types in kernels/, paro_runtime/, nodes/ by the rules in pyproject.toml: `python scripts/check_types.py`.

mypy names modules by the folders they lie in, and the checkout may have any name: so it sees the code through a folder
that holds nothing but links, called as tests and scripts call the package.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "comfyui_paro"
CHECKED = ("kernels", "paro_runtime", "nodes")


def show(source: Path, target: Path) -> None:
    """Put a file or folder in a second place: a link where the system lets one make it, else a copy."""
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def main() -> int:
    """mypy's exit status: 0 without errors."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / PACKAGE
        package.mkdir()
        for name in ("__init__.py", *CHECKED):
            show(ROOT / name, package / name)
        packages = [argument for name in CHECKED for argument in ("-p", f"{PACKAGE}.{name}")]
        options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", os.devnull]
        command = [sys.executable, "-m", "mypy", *options, *packages, *sys.argv[1:]]
        return subprocess.run(command, cwd=folder, env={**os.environ, "MYPYPATH": folder}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
