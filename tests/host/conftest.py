"""Host tests: a real ComfyUI checkout, booted once in this process on the CPU, with tiny real architectures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from comfyui_paro.scripts._host import find_host, host_version

NO_HOST = (
    "NO COMFYUI FOUND: host tests did not run. Set COMFYUI_PATH to a checkout (REQUIRE_COMFYUI=1 makes this fail)."
)

# As `requires-comfyui` in pyproject.toml says: Wan tells which block is running since then.
FLOOR = (0, 5, 0)


def pytest_report_header() -> str:
    path = find_host()
    return "host: none" if path is None else f"host: ComfyUI {host_version(path)} at {path}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def host_path() -> Path:
    """The ComfyUI checkout; without one the test is skipped, or fails with REQUIRE_COMFYUI=1."""
    path = find_host()
    if path is None:
        if os.environ.get("REQUIRE_COMFYUI") == "1":
            pytest.fail(NO_HOST)
        pytest.skip(NO_HOST)
    if tuple(int(n) for n in host_version(path).split(".")[:3]) < FLOOR:
        pytest.fail(f"ComfyUI {host_version(path)} is older than {'.'.join(map(str, FLOOR))}, the oldest supported")
    return path


@pytest.fixture(scope="session")
def comfy(host_path: Path):
    """The booted host: the module `tests/host/tiny.py`, which builds, loads, samples and patches."""
    from comfyui_paro.scripts.comfy_boot import boot

    boot(host_path)
    from comfyui_paro.tests.host import tiny

    return tiny


@pytest.fixture(scope="session")
def wan_file(comfy, tmp_path_factory) -> Path:
    """A tiny random Wan text-to-video checkpoint."""
    return comfy.build_wan(tmp_path_factory.mktemp("wan") / "wan.safetensors")


@pytest.fixture(scope="session")
def flux_file(comfy, tmp_path_factory) -> Path:
    """A tiny random Flux checkpoint."""
    return comfy.build_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture
def wan(comfy, wan_file):
    """The tiny Wan as the host's loader gives it, fresh for every test."""
    return comfy.load(wan_file)


@pytest.fixture
def flux(comfy, flux_file):
    """The tiny Flux as the host's loader gives it, fresh for every test."""
    try:
        return comfy.load(flux_file)
    except ValueError as error:
        pytest.skip(f"this host knows only one number of Flux heads: {error}")


@pytest.fixture
def store(tmp_path):
    """An empty folder for plans."""
    from comfyui_paro.paro_runtime.plan_store import PlanStore

    return PlanStore([], tmp_path / "paro")
