"""Set up what the tests need and run them: `python scripts/test.py [pytest arguments]`.

Tests run side by side, one process for each of up to four cores. With a ComfyUI checkout at hand (COMFYUI_PATH,
../ComfyUI, ~/ComfyUI) the host tests run too; without one they are skipped, loudly. REQUIRE_COMFYUI=1 makes a missing
host an error.
"""

import os
import subprocess
import sys
from pathlib import Path

from _environment import TEST_MODULES, ensure
from _host import find_host, host_version

ROOT = Path(__file__).resolve().parent.parent
MOST_JOBS = 4  # each boots the host
CHECKS = (
    ("-m", "ruff", "check", "."),
    ("-m", "ruff", "format", "--check", "."),
    ("scripts/check_imports.py",),
    ("scripts/check_types.py",),
)


def main() -> int:
    host = find_host()
    if host is None and os.environ.get("REQUIRE_COMFYUI") == "1":
        raise SystemExit("REQUIRE_COMFYUI=1, but no ComfyUI was found; set COMFYUI_PATH")
    ensure(TEST_MODULES, host)
    if host is None:
        print("no ComfyUI found: the host tests will be skipped (set COMFYUI_PATH to run them)", flush=True)
    else:
        print(f"ComfyUI {host_version(host)} at {host}", flush=True)
    for check in CHECKS:
        if subprocess.run([sys.executable, *check], cwd=ROOT).returncode:
            return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(MOST_JOBS, cores)
    arguments = sys.argv[1:] or ["tests", "-n", str(jobs), "--dist", "worksteal"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if host is not None:
        environment["COMFYUI_PATH"] = str(host)
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
