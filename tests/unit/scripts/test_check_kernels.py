"""`scripts/check_kernels.py` without compiling: what it would compile are the kernels as they are today."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from comfyui_paro.scripts import check_kernels


class CapturedError(Exception):
    """In the place of a compiled kernel."""


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_every_constant_is_an_argument_of_the_kernel(capability, monkeypatch):
    import _compile  # its folder is on the path since `check_kernels` was imported

    seen = set()

    def compile_kernel(kernel, pointers, constants, capability, warps, stages):
        unknown = set(constants) - set(kernel.arg_names)
        assert not unknown, f"{kernel.__name__}: {unknown}"
        seen.add(kernel.__name__)
        raise CapturedError

    monkeypatch.setattr(_compile, "compile_kernel", compile_kernel)
    for row in check_kernels.rows_to_check(False, [capability]):
        with pytest.raises(CapturedError):
            check_kernels.compile_row(row)
    names = {"list_blocks", "_mean_queries", "prepare_keys_values", "store_pools", "attention_forward"}
    assert names == seen
