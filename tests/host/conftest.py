"""Host tests: a real ComfyUI checkout, booted once in this process, with tiny real architectures.

It is booted on a GPU where there is one. What needs it on the CPU, where results are exact, is skipped then; with
`CUDA_VISIBLE_DEVICES=` in the environment it is the other way round.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from comfyui_paro.scripts._host import find_host, host_version
from comfyui_paro.scripts.comfy_server import ComfyServer
from comfyui_paro.tests.host.cases import DEVICE

NO_HOST = (
    "NO COMFYUI FOUND: host tests did not run. Set COMFYUI_PATH to a checkout (REQUIRE_COMFYUI=1 makes this fail)."
)
ELSEWHERE = {
    "host_on_cpu": "A GPU IS THERE: the host runs on it; for exact tests on the CPU set CUDA_VISIBLE_DEVICES=",
    "host_on_gpu": "NO GPU: the host is not tested on one",
}
# What the host's server needs beside the host's own code.
SERVER_MODULES = ("aiohttp", "comfyui_frontend_package")

# As `requires-comfyui` in pyproject.toml says: Wan tells which block is running since then.
FLOOR = (0, 5, 0)
PACK = Path(__file__).resolve().parent.parent.parent
# A prompt without text encoder, for both servers; a model that PARO does not know, and a VAE that is none.
PROMPT_NODE = """
import copy

import torch

class Prompt:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"seed": ("INT", {"default": 0})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    def make(self, seed):
        return ([[torch.randn(1, 3, 4096, generator=torch.Generator().manual_seed(seed)), {}]],)

class OtherModel:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "test"

    def make(self, model):
        made = model.clone()
        made.model = copy.copy(model.model)
        made.model._modules = dict(model.model._modules)
        inner = copy.copy(model.model.diffusion_model)
        inner.__class__ = type("HomeMade", (torch.nn.Module,), {})
        made.model.diffusion_model = inner
        return (made,)

class NoVae:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "make", "test"

    def make(self):
        return (object(),)

NODE_CLASS_MAPPINGS = {"TestPrompt": Prompt, "TestOtherModel": OtherModel, "TestNoVae": NoVae}
"""


def pytest_report_header() -> str:
    path = find_host()
    return "host: none" if path is None else f"host: ComfyUI {host_version(path)} at {path} on {DEVICE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.host)
            other = "host_on_gpu" if DEVICE == "cpu" else "host_on_cpu"
            if item.get_closest_marker(other):
                item.add_marker(pytest.mark.skip(reason=ELSEWHERE[other]))


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


@pytest.fixture(autouse=True)
def kernels_compile_in_line(monkeypatch):
    """Steps that stay on the host's attention until kernels are compiled would be another test."""
    monkeypatch.setenv("PARO_COMPILE_AHEAD", "0")


@pytest.fixture(autouse=True)
def models_are_gone():
    """On a GPU the host keeps a list of loaded models, and fails when one of them dies while it goes through it."""
    yield
    if DEVICE == "cuda":
        gc.collect()


@pytest.fixture(scope="session")
def comfy(host_path: Path):
    """The booted host: the module `tests/host/tiny.py`, which builds, loads, samples and patches."""
    from comfyui_paro.scripts.comfy_boot import boot

    boot(host_path, DEVICE)
    from comfyui_paro.tests.host import tiny

    if DEVICE == "cuda":
        _sample_once()
    return tiny


def _sample_once() -> None:
    """The first sampling of a process on a GPU differs from all later ones by rounding, in processes without PARO too:
    20 samplings of 14 tiny models, H200. After it every one is the same to the bit."""
    from comfyui_paro.tests.host import tiny_families
    from comfyui_paro.tests.host.cases_video import CASES

    case = next(case for case in CASES if case.name == "wan_t2v")
    with torch.inference_mode():
        model = tiny_families.build(case, torch.bfloat16, DEVICE)
        tiny_families.sample(model, case, case.runs[0])


@pytest.fixture(scope="session")
def tiny(comfy):
    """The builders of every family, which import the booted host."""
    from comfyui_paro.tests.host import tiny_families

    return tiny_families


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
    from comfyui_paro.paro_runtime.plan.store import PlanStore

    return PlanStore([], tmp_path / "paro")


def _server(host: Path, pack: Path | None, folder: Path) -> ComfyServer:
    missing = [name for name in SERVER_MODULES if find_spec(name) is None]
    if missing and os.environ.get("REQUIRE_COMFYUI") != "1":
        pytest.skip(f"NO SERVER: this Python lacks {' and '.join(missing)}")
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "custom_nodes" / "test_prompt.py").write_text(PROMPT_NODE)
    models = folder / "models" / "diffusion_models"
    models.mkdir(parents=True)
    (models / "tiny.safetensors").symlink_to(PACK / "tests" / "tiny_wan" / "paro-tiny-wan.safetensors")
    return ComfyServer(host, pack, folder)


@pytest.fixture(scope="session")
def server(host_path, tmp_path_factory):
    """A running server with the pack."""
    with _server(host_path, PACK, tmp_path_factory.mktemp("paro")) as server:
        yield server


@pytest.fixture(scope="module")
def stock_server(host_path, tmp_path_factory):
    """A running server that never saw the pack."""
    with _server(host_path, None, tmp_path_factory.mktemp("stock")) as server:
        yield server


@pytest.fixture(scope="session")
def page(server):
    """Runs scripts/page.mjs against the server, with environment variables in capitals; skips without Node,
    playwright-core or a Chromium."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    node = shutil.which("node")
    probe = ["-e", "require('playwright-core')"]
    if node is None or chromium is None or subprocess.run([node, *probe], capture_output=True).returncode:
        pytest.skip("NO BROWSER: needs node, the npm package playwright-core (NODE_PATH) and Chromium (CHROMIUM)")

    def run(*arguments: str, **variables: str) -> dict:
        command = [node, str(PACK / "scripts" / "page.mjs"), arguments[0], server.url, *map(str, arguments[1:])]
        environment = {**os.environ, "CHROMIUM": chromium, **variables}
        done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
