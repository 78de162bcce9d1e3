"""Error of every precision, with and without rotation, at full density and at 0.3: `python bench/accuracy.py`.

Relative L2 of the PyTorch reference (which emulates the kernels' integers) against float64 on unit normal data; four
channels of K are eight times as large as the rest, from token to token, so that taking the mean away does not help.
At 0.3 against the masked float64 result. Needs no GPU.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import _checkout

_checkout.register()

import torch  # noqa: E402
from comfyui_paro.bench.problems import Shape, inputs, pattern  # noqa: E402
from comfyui_paro.kernels.attention.reference import sparse_attention_reference  # noqa: E402
from comfyui_paro.kernels.core.precision import PRECISIONS  # noqa: E402

OUTLIERS = 4


def errors(dim: int, density: float, rotated: bool, seed: int = 0) -> dict[str, float]:
    """Relative L2 by precision at one head dimension and density."""
    shape = Shape(0, (8, 12, 20), 0, 2, dim, "accuracy")
    q, k, v = (x.double() for x in inputs(shape, 2, torch.float32, "cpu", seed))
    k[..., :OUTLIERS] *= 8
    p = pattern(shape, 2, density, "random", False, "cpu")
    exact = sparse_attention_reference(q, k, v, p, PRECISIONS["16bit"])
    result = {}
    for name, precision in PRECISIONS.items():
        out = sparse_attention_reference(q.float(), k.float(), v.float(), p, replace(precision, hadamard=rotated))
        result[name] = ((out - exact).norm() / exact.norm()).item()
    return result


def main() -> int:
    print("| D | density | rotation | " + " | ".join(PRECISIONS) + " |")
    print("|---|---|---|" + "---|" * len(PRECISIONS))
    for dim in (64, 128):
        for density in (1.0, 0.3):
            for rotated in (False, True):
                row = errors(dim, density, rotated)
                cells = " | ".join(f"{error:.1e}" for error in row.values())
                print(f"| {dim} | {density:g} | {'yes' if rotated else 'no'} | {cells} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
