"""Compile every shipped tile configuration for GPUs that are not there and check the machine code.

    python scripts/check_kernels.py [--json] [--quick] [--capability 90 ...]

Prints registers, spills, shared memory, tensor-core instructions and issue slots per softmax element. Exits 1 where a
loop spills, the expected tensor instruction is missing, wgmma is serialised, shared memory exceeds the GPU's or the
loop at D = 128 needs more issue slots than stated here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have
LOWEST_FP8 = 89
# What the two products must compile to. On sm_100 INT8 is mma.sync before Triton 3.9 and tcgen05 after.
EXPECTED_QK = {90: {"IGMMA"}, 100: {"IMMA", "UTCIMMA"}}
EXPECTED_PV = {
    "16": {90: {"HGMMA"}, 100: {"UTCHMMA"}},
    "fp8": {90: {"QGMMA"}, 100: {"UTCQMMA"}},
    "int8": {90: {"IGMMA"}, 100: {"IMMA", "UTCIMMA"}},
}
# Issue slots per softmax element of INT8 Q K^T at D = 128, whatever the mask's rows.
SLOT_LIMITS = {90: {"16": 10.0, "fp8": 10.0}, **{sm: {"16": 15.0, "fp8": 15.0} for sm in (80, 86, 89, 120)}}
DEFAULT_MMA = {"16": {"HMMA"}, "fp8": {"QMMA"}, "int8": {"IMMA"}}


@dataclass(frozen=True)
class Row:
    """One configuration to compile: block_q 64 or 128 with a list and the tail, 0 for the dense call."""

    capability: int
    dim: int
    precision: str
    block_q: int


def rows_to_check(quick: bool, capabilities: list[int]) -> list[Row]:
    """Every distinct tile of the table; quick: D = 128 with a list and the tail only."""
    from comfyui_paro.kernels.configs import tile_for
    from comfyui_paro.kernels.problem import PRECISIONS

    result, seen = [], set()
    for capability in capabilities:
        for dim in (128,) if quick else (128, 64, 256):
            for name, precision in PRECISIONS.items():
                qk, pv = precision.qk, precision.pv
                if (pv == "fp8" and capability < LOWEST_FP8) or (quick and name == "16bit"):
                    continue
                for block_q in (128,) if dim == 256 else (64, 128) if quick else (64, 128, 0):
                    tile = tile_for((capability // 10, capability % 10), dim, qk, pv, block_q, block_q > 0)
                    # Wide masks over narrow tiles compile to the same loop as narrow masks.
                    key = (capability, dim, name, tile, block_q > 0)
                    if key not in seen:
                        seen.add(key)
                        result.append(Row(capability, dim, name, block_q))
    return result


def compile_row(row: Row) -> dict:
    """Compile one configuration with bf16 inputs; the figures, and under `problems` what is wrong."""
    import _checkout
    import _compile

    _checkout.register()
    from comfyui_paro.kernels import triton_attention
    from comfyui_paro.kernels.call import P_LOG2, kernel_pv, packs
    from comfyui_paro.kernels.configs import in_channel_halves, needs_separate_tail, tail_stages, tile_for
    from comfyui_paro.kernels.problem import PRECISIONS

    precision = PRECISIONS[row.precision]
    qk, pv = precision.qk, kernel_pv(precision)
    listed = row.block_q > 0
    capability = (row.capability // 10, row.capability % 10)
    tile = tile_for(capability, row.dim, qk, pv, row.block_q, listed)
    pointers = {
        "Q": "*bf16",
        "OUT": "*bf16",
        "nonfinite": "*i32",
        "q_excess": "*i32",
        "K": "*bf16" if qk == "16" else "*i8",
        "V": {"16": "*bf16", "fp8": "*fp8e4nv", "int8": "*i8"}[pv],
        **dict.fromkeys(("q_scales", "k_scales", "key_bias"), "*fp32"),
        **dict.fromkeys(("tables", "order_of_head"), "*i32"),
        "scale_log2": "fp32",
    }
    lists = dict.fromkeys(("head_order", "row_order", "list_start", "list_full", "list_all"), "*i32")
    optional = {
        **lists,
        "block_list": "*i16",
        "kept_words": "*i64",
        "pooled_k": pointers["K"],
        "pooled_v": "*bf16" if pv == "16" else "*fp16",
        "pooled_scales": "*fp32",
        "tail_bias": "*fp32",
    }
    constants = {
        "D": row.dim, "PADDED_D": row.dim, "ROWS": tile.rows, "BLOCK_Q": row.block_q or tile.rows, "PAIRS": tile.pairs,
        "QK": qk, "PV": pv, "P_LOG2": P_LOG2[precision.pv],
        "LISTED": listed, "TAIL": listed, "POOL": 64, "BIASED": False, "ROTATE": False, "VALUES_SCALED": pv != "16",
        "PACKED": packs(precision, row.dim),
        "SEPARATE_TAIL": needs_separate_tail(capability, pv, row.dim),
        "HALVES": in_channel_halves(capability, tile, row.dim),
        "STAGES": tile.stages, "TAIL_STAGES": tail_stages(capability, tile), "stride_qd": 1,
        "rotation": None,
    }  # fmt: skip
    pointers.update(optional if listed else {})
    constants.update({} if listed else dict.fromkeys(optional))
    pointers.update({"v_scales": "*fp32"} if pv != "16" else {})
    constants.update({} if pv != "16" else {"v_scales": None})
    kernel = _compile.compile_kernel(
        triton_attention.attention_forward, pointers, constants, row.capability, tile.warps, tile.stages
    )
    found = _compile.inspect(kernel, tile.warps, tile.rows * (128 if tile.pairs else 64))
    expected = [DEFAULT_MMA[pv] if row.capability not in EXPECTED_PV[pv] else EXPECTED_PV[pv][row.capability]]
    if qk == "16":
        expected.append(expected[0])
    else:
        expected.append(EXPECTED_QK.get(row.capability, {"IMMA"}))
    names = {name.split(".")[0] for name in found.mma}
    problems = [f"no {' or '.join(sorted(wanted))}" for wanted in expected if not names & wanted]
    if found.loop_spills:
        problems.append(f"{found.loop_spills} spills in a loop")
    if found.shared > SHARED_LIMIT[row.capability] * 1024:
        problems.append(f"shared memory over {SHARED_LIMIT[row.capability]} KiB")
    limit = SLOT_LIMITS.get(row.capability, {}).get(pv) if qk != "16" and row.dim == 128 else None
    if limit and found.slots > limit:
        problems.append(f"more than {limit:g} issue slots")
    if found.serialized:
        problems.append("wgmma is serialised")
    return {**asdict(row), "tile": asdict(tile), **asdict(found), "problems": problems}


def line_of(result: dict) -> str:
    """One line of the table."""
    tile = result["tile"]
    name = f"{tile['rows']}x{'2x64' if tile['pairs'] else '64'} w{tile['warps']} st{tile['stages']}"
    call = f"q{result['block_q']}" if result["block_q"] else "dense"
    spills = f"{result['loop_spills']}+{result['spills'] - result['loop_spills']}"
    return (
        f"{result['capability']:<4} {result['dim']:<4} {result['precision']:<10} {call:<7} {name:<15} "
        f"{result['registers']:<5} {spills:<7} {result['shared'] // 1024:<4} {result['slots']:<6.1f} "
        + ", ".join(result["mma"])
        + "".join(f"  PROBLEM: {problem}" for problem in result["problems"])
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="D = 128 with a list and the tail only")
    parser.add_argument("--capability", type=int, nargs="*", default=list(CAPABILITIES))
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import _calibration_kernels
    import _checkout

    _checkout.register()
    rows = rows_to_check(arguments.quick, arguments.capability)
    results = []
    if not arguments.json:
        print("sm   D    precision  call    tile            regs  spills  KiB  slots  tensor instructions")
    others = _calibration_kernels.rows_to_check(arguments.quick, arguments.capability)
    limits = [SHARED_LIMIT[row.capability] for row in others]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        parts = (
            (line_of, pool.map(compile_row, rows)),
            (_calibration_kernels.line_of, pool.map(_calibration_kernels.compile_row, others, limits)),
        )
        for its_line, part in parts:
            for result in part:
                results.append(result)
                if not arguments.json:
                    print(its_line(result), flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        print(
            f"{len(results)} configurations. spills: in loops + outside; slots: per softmax element of the main loop."
        )
    return int(any(r["problems"] for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
