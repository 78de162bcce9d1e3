"""Compiles the Gluon kernel for sm_90 without one, for `check_kernels.py`."""

from __future__ import annotations

from dataclasses import asdict

import triton
from _compile import MATRIX, SPILL, Compiled, disassemble, matrix_loops
from triton.backends.compiler import GPUTarget

CAPABILITY = 90
DIMS = (128, 64)
PRECISIONS = ("fp8", "int8")
SHARED_LIMIT = 227 * 1024
SLOT_LIMIT = 10.0
# Words that ptxas parks in local memory in a main loop. Triton 3.6.0: at most 2. With 3.7.1 one warpgroup's loop over
# listed blocks in FP8 has 8, and 16 with a tail, which is not a chosen form (`gluon_sm90.launch.CHOICES`).
SPILL_LIMIT = 16
# Of one warpgroup in one step.
WARPS, ELEMENTS = 4, 64 * 128
PRODUCTS = {"fp8": {"IGMMA", "QGMMA"}, "int8": {"IGMMA", "HGMMA"}}


def missing() -> str | None:
    """Why it cannot be compiled here, or None."""
    try:
        from comfyui_paro.kernels.attention.gluon_sm90 import forward as gluon_attention  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"Triton {triton.__version__} has no Gluon as the kernel wants it: {error}"
    return None


def rows_to_check(quick: bool) -> list[tuple[int, str, str]]:
    """(head dimension, precision, form of the call): all that can be launched, chosen or not."""
    return [
        (dim, precision, form)
        for dim in DIMS[: 1 if quick else None]
        for precision in PRECISIONS
        for form in (("tail",) if quick else ("tail", "list", "dense"))
    ]


def compile_row(row: tuple[int, str, str]) -> dict:
    """As `check_kernels.compile_row`, with bf16 inputs."""
    import _checkout

    _checkout.register()
    dim, precision, form = row
    found, names = _read(_compile(dim, precision, form), 2 + (form == "tail"))
    problems = [f"no {name}" for name in sorted(PRODUCTS[precision] - names)]
    if found.loop_spills > SPILL_LIMIT:
        problems.append(f"more than {SPILL_LIMIT} spills in a main loop")
    if found.shared > SHARED_LIMIT:
        problems.append("shared memory over 227 KiB")
    if found.slots > SLOT_LIMIT:
        problems.append(f"more than {SLOT_LIMIT:g} issue slots")
    if found.serialized:
        problems.append("wgmma is serialised")
    from comfyui_paro.kernels.attention.gluon_sm90.launch import TILE

    return {
        "capability": CAPABILITY, "dim": dim, "precision": f"{precision} gluon",
        "block_q": 0 if form == "dense" else 128, "form": form, "tile": asdict(TILE), **asdict(found),
        "problems": problems,
    }  # fmt: skip


def _compile(dim: int, precision: str, form: str):
    """Every argument typed as the launch passes it; descriptors carry their block and its shared-memory layout."""
    from comfyui_paro.kernels.attention.gluon_sm90.forward import gluon_forward
    from comfyui_paro.kernels.attention.gluon_sm90.launch import options
    from comfyui_paro.kernels.core import precision as precisions
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    types = {"i8": gl.int8, "fp8e4nv": gl.float8e4nv, "fp16": gl.float16, "bf16": gl.bfloat16}

    def descriptor(name, rows, columns):
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], types[name])
        return f"tensordesc<{name}[{rows}, {columns}],{layout!r}>"

    fp8 = precision == "fp8"
    present = {
        **dict.fromkeys(("Q", "OUT"), "*bf16"),
        **dict.fromkeys(("tables", "order_of_head", "nonfinite"), "*i32"),
        "K": descriptor("i8", 64, dim),
        "V": descriptor("fp8e4nv", dim, 64) if fp8 else descriptor("bf16", 64, dim),
        "k_scales": "*fp32",
        "scale_log2": "fp32",
    }
    of_list = {
        **dict.fromkeys(("head_order", "row_order", "list_start", "list_full", "list_all"), "*i32"),
        "block_list": "*i16",
    }
    of_tail = {
        "kept_words": "*i64",
        "pooled_k": descriptor("i8", 64, dim),
        "pooled_v": descriptor("fp16" if fp8 else "bf16", 64, dim),
        **dict.fromkeys(("pool_scales", "pool_bias", "tail_bias"), "*fp32"),
    }
    chosen = options(dim, precisions.PRECISIONS[precision], form != "dense", form == "tail")
    launch = {name: chosen.pop(name) for name in ("num_warps", "maxnreg", "enable_fp_fusion")}
    absent = [] if fp8 else ["v_scales"]
    present.update({"v_scales": "*fp32"} if fp8 else {})
    for names, there in ((of_list, form != "dense"), (of_tail, form == "tail")):
        if there:
            present.update(names)
        else:
            absent += names
    constants = {**chosen, **dict.fromkeys(absent)}
    signature, attributes = {}, {}
    for index, name in enumerate(gluon_forward.arg_names):
        kind = present.get(name, "i32")
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and (kind.startswith("*") or name.startswith("stride")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {(gluon_forward.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(gluon_forward, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=launch)


def _read(kernel, loops_each: int) -> tuple[Compiled, set[str]]:
    """What is to be known of the kernel, and the products' names. Each warpgroup has a code of its own: the first of
    its `loops_each` loops is the main one (then masked steps, then pools); `Compiled` names the worse of the two."""
    code, registers = disassemble(kernel)
    loops = matrix_loops(code)
    mains = [loops[0], loops[loops_each]]
    products = [name for name in mains[0] if MATRIX.match(name)]
    waits = max(sum(name.startswith("WARPGROUP.DEPBAR") for name in loop) for loop in mains)
    found = Compiled(
        registers,
        len(SPILL.findall(code)),
        max(sum(bool(SPILL.match(name)) for name in loop) for loop in mains),
        kernel.metadata.shared,
        max(map(len, mains)) * WARPS * 32 / ELEMENTS,
        tuple(sorted(set(products))),
        waits >= len(products),
    )
    return found, {name.split(".")[0] for name in products}
