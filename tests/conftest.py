"""Shared set-up: the checkout becomes importable as `comfyui_paro`, and tests run as the host runs its nodes."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_spec = importlib.util.spec_from_file_location(
    "_checkout", Path(__file__).resolve().parent.parent / "scripts" / "_checkout.py"
)
_checkout = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_checkout)
_checkout.register()


@pytest.fixture(autouse=True)
def inference_mode(request: pytest.FixtureRequest):
    """Every test runs under `torch.inference_mode()`, as everything in the host does: tensors made there count no
    versions and refuse what ordinary ones allow. `@pytest.mark.ordinary_tensors` keeps a test out of it."""
    with torch.inference_mode(request.node.get_closest_marker("ordinary_tensors") is None):
        yield
