"""Compile every shipped tile configuration for GPUs that are not there and check the machine code.

    python scripts/check_kernels.py [--json] [--quick] [--capability 90 ...] [--record]

Prints registers, spills, shared memory, tensor-core instructions and issue slots per softmax element, and compiles the
pre-pass, the writer of lists and the makers of the tail's pools too. Exits 1 where a loop (or one of those) spills, the
expected tensor instruction is missing, wgmma is serialised, shared memory exceeds the GPU's or the loop at D = 128
needs more issue slots than stated here; and where a tile needs more issue slots, or fits into a multiprocessor fewer
times, than recorded for this Triton (`_kernel_record`; --record writes what is found instead). The Gluon kernel
for sm_90 has limits of its own (`_compile_gluon`); with a Triton that cannot compile it, that is said.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import _kernel_record

CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have
# What the two products must compile to. On sm_100 INT8 is mma.sync before Triton 3.9 and tcgen05 after.
EXPECTED_QK = {90: {"IGMMA"}, 100: {"IMMA", "UTCIMMA"}}
EXPECTED_PV = {
    "16": {90: {"HGMMA"}, 100: {"UTCHMMA"}},
    "fp8": {90: {"QGMMA"}, 100: {"UTCQMMA"}},
    "int8": {90: {"IGMMA"}, 100: {"IMMA", "UTCIMMA"}},
}
# Issue slots per softmax element of INT8 Q K^T at D = 128, whatever the mask's rows, with any Triton.
SLOT_LIMITS = {90: {"16": 10.0, "fp8": 10.0}, **{sm: {"16": 16.0, "fp8": 15.0} for sm in (80, 86, 89, 120)}}
DEFAULT_MMA = {"16": {"HMMA"}, "fp8": {"QMMA"}, "int8": {"IMMA"}}


# Stores and loads of a parked register among some 600 instructions of a dense call's loop, by precision, architecture
# and head dimension: no tile without them was found. In 16 bits on sm_120 with Triton 3.6.0 alone; 64 rows, which park
# none, take 31 slots instead of 18.
PARKED = {("16bit", 90, 128): 2, ("16bit", 120, 128): 8, ("int8_pv8", 120, 128): 3}
# The same in kernels without a loop, where it happens once: the rotating pre-pass on sm_86 and 89 with Triton 3.6.0.
PARKED_ONCE = 1
LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
PREPARE, LISTS, POOLS, MEANS = -1, -2, -3, -4
NAMES = {PREPARE: "prepass", LISTS: "lists", POOLS: "pools", MEANS: "means"}


@dataclass(frozen=True)
class Row:
    """One kernel to compile. block_q: of attention with a list and the tail 64 or 128, without 0; or one of `NAMES`."""

    capability: int
    dim: int
    precision: str
    block_q: int


def precisions() -> dict:
    """What a user may choose, and 8-bit Q K^T with rotation, which the runtime may."""
    from comfyui_paro.kernels.core.precision import PRECISIONS

    return {**PRECISIONS, **{f"{name}+rot": p.rotated for name, p in PRECISIONS.items() if p.rotated is not None}}


def rows_to_check(quick: bool, capabilities: list[int]) -> list[Row]:
    """Every distinct tile of the table, the pre-pass, what makes the tail's pools; quick: for D = 128, attention with a
    list and the tail, pools in INT4 only."""
    import torch
    from comfyui_paro.kernels.attention.tiles import tile_for
    from comfyui_paro.kernels.core.support import Request, nvidia, triton_reason

    result, seen = [], set()
    for capability in capabilities:
        pair = (capability // 10, capability % 10)
        result.append(Row(capability, 0, "", LISTS))
        for dim in (128,) if quick else (128, 64, 256):
            result += [] if quick else [Row(capability, dim, "16bit", MEANS)]
            for name, precision in precisions().items():
                rotated = precision.hadamard and precision.keys.bits == 8
                served = triton_reason(Request(nvidia(pair), torch.bfloat16, dim, precision)) is None
                if not served or (quick and (name == "16bit" or rotated)):
                    continue
                if not quick and dim == 128:
                    result.append(Row(capability, dim, name, PREPARE))
                if dim == 128 and (name == "int4" or not quick):
                    result.append(Row(capability, dim, name, POOLS))
                if rotated and dim != 128:
                    continue
                for block_q in (128,) if dim == 256 or rotated else (64, 128) if quick else (64, 128, 0):
                    tile = tile_for(pair, dim, precision, block_q, block_q > 0)
                    # Wide masks over narrow tiles compile to the same loop as narrow masks.
                    key = (capability, dim, name, tile, block_q > 0)
                    if key not in seen:
                        seen.add(key)
                        result.append(Row(capability, dim, name, block_q))
    return result


def call_for(row: Row):
    """The plan of such a call with bf16 inputs, as it would be launched, and what K, V and pooled V are stored in."""
    import torch
    from comfyui_paro.kernels.attention.launch_plan import CallKey, call_of, storage_types
    from comfyui_paro.kernels.core.layout import Geometry
    from comfyui_paro.kernels.core.pattern import MOST_EXPANSIONS

    listed = row.block_q != 0
    capability = (row.capability // 10, row.capability % 10)
    # Short enough for the pre-pass to finish the statistics itself, unless it rotates.
    geometry = Geometry(512, (1, 64, 64), 0, max(row.block_q, 64))
    precision = precisions()[row.precision]
    key = CallKey(1, 8, 1, row.dim, torch.bfloat16, capability, geometry, precision, 64, listed, False, listed)
    key = replace(key, expansions=MOST_EXPANSIONS)
    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv"}
    return call_of(key), [names[dtype] for dtype in storage_types(key)]


def arguments_of(options: dict, types: list[str]) -> tuple[dict, dict]:
    """Pointer types and constants that the attention kernel and the pre-pass have in common."""
    keys, _, pooled_values = types
    pointers = {"pooled_k": keys, "pooled_v": pooled_values, "tables": "*i32", "order_of_head": "*i32"}
    pointers.update(dict.fromkeys(("k_scales", "v_scales", "pooled_scales", "pool_bias", "k_means"), "*fp32"))
    constants = {name: value for name, value in options.items() if name not in LAUNCH_OPTIONS}
    if options["ROTATE"]:
        pointers["rotation"] = "*bf16"
    else:
        constants["rotation"] = None
    return pointers, constants


def compile_row(row: Row) -> dict:
    """Compile one kernel; the figures, and under `problems` what is wrong."""
    import _checkout

    _checkout.register()
    others = {PREPARE: compile_prepass, LISTS: compile_lists, POOLS: compile_pools, MEANS: compile_means}
    return others.get(row.block_q, compile_attention)(row)


def compile_prepass(row: Row) -> dict:
    """`prepare_keys_values`."""
    import _compile
    from comfyui_paro.kernels.attention import triton_prepare

    call, types = call_for(row)
    options = call.prepare_options
    pointers, constants = arguments_of(options, types)
    pointers |= {"K": "*bf16", "V": "*bf16", "k_out": types[0], "v_out": types[1], "rotation_scale": "fp32"}
    pointers |= dict.fromkeys(("bias_out", "sums", "largest"), "*fp32")
    constants |= {"key_bias": None, "stride_kd": 1, "stride_vd": 1}
    kernel = _compile.compile_kernel(
        triton_prepare.prepare_keys_values, pointers, constants, row.capability, options["num_warps"], 3
    )
    return without_products(row, kernel)


def compile_pools(row: Row) -> dict:
    """`store_pools` around mean queries."""
    import _compile
    from comfyui_paro.kernels.pooling import triton_quantized_pools

    call, types = call_for(row)
    options = call.pools_options
    pointers, constants = arguments_of(options, types)
    pointers |= dict.fromkeys(("K", "V", "means"), "*bf16") | dict.fromkeys(("scale_log2", "rotation_scale"), "fp32")
    constants |= {"key_bias": None, "stride_kd": 1, "stride_vd": 1}
    kernel = _compile.compile_kernel(
        triton_quantized_pools.store_pools, pointers, constants, row.capability, options["num_warps"], 3
    )
    return without_products(row, kernel)


def compile_means(row: Row) -> dict:
    """`_mean_queries` with the tables of key heads."""
    import _compile
    from comfyui_paro.kernels.pooling import reference as pools
    from comfyui_paro.kernels.pooling import triton_pools

    pointers = {**dict.fromkeys(("Q", "means"), "*bf16"), "tables": "*i32", "order_of_head": "*i32"}
    constants = {"D": row.dim, "PADDED_D": row.dim, "BLOCK_Q": 128, "ROWS": pools.MEAN_ROWS, "stride_qd": 1}
    kernel = triton_pools._mean_queries
    return without_products(row, _compile.compile_kernel(kernel, pointers, constants, row.capability, 4, 3))


def compile_lists(row: Row) -> dict:
    """`list_blocks`."""
    import _compile
    from comfyui_paro.kernels.attention import block_list_layout, triton_block_lists

    constants = {"COLUMNS": triton_block_lists.COLUMNS, "PADDING": block_list_layout.LIST_PADDING}
    pointers = {"kept_words": "*i64", "blocks": "*i16"}
    kernel = _compile.compile_kernel(
        triton_block_lists.list_blocks, pointers, constants, row.capability, triton_block_lists.WARPS, 3
    )
    return without_products(row, kernel)


def without_products(row: Row, kernel) -> dict:
    """What is to be known of a kernel without a loop of tensor products."""
    import _compile

    code, registers = _compile.disassemble(kernel)
    spills = len(_compile.SPILL.findall(code))
    problems = [f"{spills} spills"] if spills > PARKED_ONCE else []
    if kernel.metadata.shared > SHARED_LIMIT[row.capability] * 1024:
        problems.append(f"shared memory over {SHARED_LIMIT[row.capability]} KiB")
    return {
        **asdict(row),
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared,
        "problems": problems,
    }


def compile_attention(row: Row) -> dict:
    """`attention_forward`."""
    import _compile
    from comfyui_paro.kernels.attention import triton_forward

    call, types = call_for(row)
    options, tile = call.attention_options, call.tile
    keys, pv, listed = call.key.precision.keys, options["PV"], options["LISTED"]
    pointers, constants = arguments_of(options, types)
    pointers |= {"Q": "*bf16", "OUT": "*bf16", "K": types[0], "V": types[1], "scale_log2": "fp32"}
    pointers |= {"q_scales": "*fp32", "key_bias": "*fp32", "q_excess": "*i32", "nonfinite": "*i32"}
    lists = dict.fromkeys(("head_order", "row_order", "list_start", "list_full", "list_all"), "*i32")
    lists |= {"block_list": "*i16", "kept_words": "*i64", "tail_bias": "*fp32"}
    pointers |= lists if listed else {}
    constants |= {"stride_qd": 1, **({} if listed else dict.fromkeys(lists))}
    kernel = _compile.compile_kernel(
        triton_forward.attention_forward, pointers, constants, row.capability, tile.warps, tile.stages
    )
    found = _compile.inspect(kernel, tile.warps, tile.rows * (128 if tile.pairs else 64))
    expected = [DEFAULT_MMA[pv] if row.capability not in EXPECTED_PV[pv] else EXPECTED_PV[pv][row.capability]]
    expected.append(EXPECTED_QK.get(row.capability, {"IMMA"}) if keys.rounds else expected[0])
    names = {name.split(".")[0] for name in found.mma}
    problems = [f"no {' or '.join(sorted(wanted))}" for wanted in expected if not names & wanted]
    parked = 0 if row.block_q else PARKED.get((row.precision, row.capability, row.dim), 0)
    if found.loop_spills > parked:
        problems.append(f"{found.loop_spills} spills in a loop")
    if found.shared > SHARED_LIMIT[row.capability] * 1024:
        problems.append(f"shared memory over {SHARED_LIMIT[row.capability]} KiB")
    limit = SLOT_LIMITS.get(row.capability, {}).get(pv) if keys.rounds and row.dim == 128 else None
    if limit and found.slots > limit:
        problems.append(f"more than {limit:g} issue slots")
    if found.serialized:
        problems.append("wgmma is serialised")
    return {**asdict(row), "tile": asdict(tile), **asdict(found), "problems": problems}


def is_recorded(result: dict) -> bool:
    """Whether it is of an attention kernel, not of the pre-pass or calibration."""
    return "kernel" not in result and result["block_q"] not in NAMES


def line_of(result: dict) -> str:
    """One line of the table."""
    problems = "".join(f"  PROBLEM: {problem}" for problem in result["problems"])
    start = f"{result['capability']:<4} {result['dim']:<4} {result['precision']:<12} "
    shared = f"{result['shared'] // 1024:<4} "
    if result["block_q"] in NAMES:
        name = NAMES[result["block_q"]]
        return f"{start}{name:<7} {'':<15} {result['registers']:<5} {result['spills']:<7} {shared}{problems}"
    tile = result["tile"]
    name = f"{tile['rows']}x{'2x64' if tile['pairs'] else '64'} w{tile['warps']} st{tile['stages']}"
    call = result.get("form") or (f"q{result['block_q']}" if result["block_q"] else "dense")
    spills = f"{result['loop_spills']}+{result['spills'] - result['loop_spills']}"
    return (
        f"{start}{call:<7} {name:<15} {result['registers']:<5} {spills:<7} {shared}{result['slots']:<6.1f} "
        + ", ".join(result["mma"])
        + f"; {_kernel_record.programs_of(result)} a multiprocessor"
        + problems
    )


def jobs_of(quick: bool, capabilities: list[int], gluon: bool) -> list[tuple]:
    """All to compile: what prints the result as a line, and what makes it, with arguments. gluon: can be compiled."""
    import _calibration_kernels
    import _compile_gluon

    jobs = [(line_of, (compile_row, row)) for row in rows_to_check(quick, capabilities)]
    if gluon and _compile_gluon.CAPABILITY in capabilities:
        jobs += [(line_of, (_compile_gluon.compile_row, row)) for row in _compile_gluon.rows_to_check(quick)]
    jobs += [
        (_calibration_kernels.line_of, (_calibration_kernels.compile_row, row, SHARED_LIMIT[row.capability]))
        for row in _calibration_kernels.rows_to_check(quick, capabilities)
    ]
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="D = 128 with a list and the tail only")
    parser.add_argument("--capability", type=int, nargs="*", default=list(CAPABILITIES))
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--record", action="store_true", help="record issue slots and occupancy of what is compiled")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    import _checkout

    _checkout.register()
    import _compile_gluon
    import triton

    missing = _compile_gluon.missing()
    jobs = jobs_of(arguments.quick, arguments.capability, not missing)
    results, recorded = [], None if arguments.record else _kernel_record.read(triton.__version__)
    if recorded is None and not arguments.record:
        print(f"not compared: nothing is recorded of Triton {triton.__version__}", file=sys.stderr)
    if not arguments.json:
        print("sm   D    precision    call    tile            regs  spills  KiB  slots  tensor instructions")
    with ProcessPoolExecutor(arguments.jobs) as pool:
        waiting = [(line, pool.submit(*job)) for line, job in jobs]
        for its_line, future in waiting:
            results.append(future.result())
            if recorded is not None and is_recorded(results[-1]):
                results[-1]["problems"] += _kernel_record.problems_of(results[-1], recorded)
            if not arguments.json:
                print(its_line(results[-1]), flush=True)
    if missing:
        print(f"not checked: {missing}", file=sys.stderr)
    if arguments.record:
        whole = not arguments.quick and set(arguments.capability) >= set(CAPABILITIES)
        _kernel_record.write(triton.__version__, [result for result in results if is_recorded(result)], whole)
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        print(
            f"{len(results)} configurations. spills: in loops + outside; slots: per softmax element of the main loop."
        )
    return int(any(r["problems"] for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
