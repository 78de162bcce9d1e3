"""Shared set-up: the checkout becomes importable as `comfyui_paro`."""

import importlib.util
import os
from pathlib import Path

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
