"""The kernels of calibration, for `check_kernels.py`: what to compile and what must come out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

EXPECTED = {90: {"HGMMA"}, 100: {"UTCHMMA"}}
DEFAULT = {"HMMA"}
DIMS = (128, 64)
# Without a product, or without one in a loop: nothing of them may spill, but for one word, stored and loaded once, of
# `pools` on sm_86 and 89 with Triton 3.6.0.
PARKED_ONCE = 2
UNLOOPED = ("means", "means32", "pools", "pools+", "pools32", "shares")


@dataclass(frozen=True)
class CalibrationRow:
    """One kernel to compile with bf16 inputs: `lse`, `blocks`, `orders` and `shares`, which follows it, `rows`,
    `costs`, `sums`, `few` (the same for few rows), `moments`, `means` and `pools` (as the
    moments want them), `pools+` (in float32, as block costs do), `means32` and `pools32` (of float32 inputs)."""

    capability: int
    dim: int
    kernel: str


def rows_to_check(quick: bool, capabilities: list[int]) -> list[CalibrationRow]:
    """Every kernel at every head dimension; quick: the costs of blocks at D = 128, which is the tightest."""
    every = ("lse", "blocks", "orders", "rows", "costs", "sums", "few", "moments", *UNLOOPED)
    kernels = ("costs",) if quick else every
    return [
        CalibrationRow(c, d, kernel) for c in capabilities for d in (DIMS[:1] if quick else DIMS) for kernel in kernels
    ]


def compile_row(row: CalibrationRow, shared_limit: int) -> dict:
    """The figures of one kernel, and under `problems` what is wrong; shared_limit in KiB."""
    import _checkout
    import _compile
    import torch

    _checkout.register()
    from comfyui_paro.kernels.pooling import reference as pools
    from comfyui_paro.kernels.pooling import triton_pools
    from comfyui_paro.kernels.statistics import triton_query_sums, triton_statistics
    from comfyui_paro.kernels.tail_error import triton_block_costs, triton_row_errors

    capability = (row.capability // 10, row.capability % 10)
    pointers = dict.fromkeys(("Q", "K", "V", "out_high", "out_low", "mean_q"), "*bf16")
    floats = ("lse", "logs", "energy", "mass", "costs", "peaks", "totals", "sums", "result", "exact")
    pointers |= dict.fromkeys((*floats, "pooled_values", "pooled_k", "pooled_v", "pool_bias", "key_weights"), "*fp32")
    pointers |= {"levels": "*u8", "tables": "*i32", "positions": "*i64"}
    pointers |= dict.fromkeys(("share", "scale_log2", "epsilon"), "fp32")
    constants: dict = {"D": row.dim, "PADDED_D": row.dim, "BLOCK_Q": 128, "POOL": 64, "PER_BLOCK": 16}
    constants |= dict.fromkeys(("BIASED", "WIDE", "ACCUMULATE"), False) | dict.fromkeys(("key_bias", "units"))
    constants |= dict.fromkeys(("stride_qd", "stride_kd", "stride_vd"), 1)
    if row.kernel in ("lse", "blocks", "orders"):
        tile_of = triton_query_sums.logs_tile if row.kernel == "orders" else triton_statistics.statistics_tile
        tile = tile_of(capability, row.dim, wide=False)
        rows, keys, warps, stages = tile.rows, tile.keys, tile.warps, tile.stages
        kernel = {
            "lse": triton_statistics._row_logsumexp,
            "blocks": triton_statistics._block_statistics,
            "orders": triton_query_sums._query_logs,
        }[row.kernel]
        constants |= {"KEYS": keys, "PRECISION": "tf32"}
        if row.kernel == "orders":
            constants |= {"KEYS": 64, "BLOCKS": keys // 64}
        if row.kernel == "blocks":
            constants |= {"PER_BLOCK": 128, "KEYS": 64, "BLOCKS": keys // 64, "DETAILED": False}
            constants |= {"maximum": None, "small": None}
    elif row.kernel in ("sums", "few"):
        tile = triton_row_errors.moments_tile(capability, wide=False, rows=64 if row.kernel == "few" else 128)
        rows, keys, warps, stages = tile.rows, 64, tile.warps, tile.stages
        kernel = triton_row_errors._row_sums
        constants |= {"KEYS": keys}
    elif row.kernel in UNLOOPED:
        rows, keys, warps, stages = pools.MEAN_ROWS, 64, 4, 3
        kernel = triton_pools._mean_queries if row.kernel.startswith("means") else triton_pools._expand
        constants |= {"KEYS": keys, "POOL": keys}
        wide = "*fp32" if row.kernel.endswith("32") else "*bf16"
        pointers |= dict.fromkeys(("Q", "K", "V", "means", "pooled_k", "pooled_v"), wide)
        pointers |= dict.fromkeys(("order_of_head", "nonfinite"), "*i32")
        if row.kernel == "pools+":
            pointers |= dict.fromkeys(("means", "pooled_k", "pooled_v"), "*fp32")
        if row.kernel == "pools":
            constants["key_weights"] = None
        if row.kernel == "pools32":
            warps = triton_pools.expand_warps(torch.float32, row.dim)
        if row.kernel == "shares":
            rows, kernel = triton_query_sums.SUM_ROWS, triton_query_sums._query_sums
            constants["BLOCKS"] = triton_query_sums.SUM_BLOCKS
    elif row.kernel == "moments":
        rows, keys, warps = triton_row_errors.POOL_TILE
        stages = 2
        pointers |= dict.fromkeys(("pooled_k", "pooled_v"), "*bf16")
        kernel = triton_row_errors._row_moments
        constants |= {"POOLS": keys, "PER_BLOCK": 1}
    else:
        rows, keys, warps, stages = triton_block_costs.ROWS, 64, 4, triton_block_costs.STAGES
        kernel = {"rows": triton_block_costs._row_outputs, "costs": triton_block_costs._block_costs}[row.kernel]
        constants |= {"KEYS": keys}
    constants["ROWS"] = rows
    wanted = set(kernel.arg_names)
    constants = {name: value for name, value in constants.items() if name in wanted}
    compiled = _compile.compile_kernel(kernel, pointers, constants, row.capability, warps, stages)
    tile = {"rows": rows, "keys": keys, "warps": warps, "stages": stages}
    if row.kernel in UNLOOPED:
        code, registers = _compile.disassemble(compiled)
        spills, products = len(_compile.SPILL.findall(code)), sorted(set(_compile.MATRIX.findall(code)))
        problems = [f"{spills} spills"] if spills > PARKED_ONCE else []
        if compiled.metadata.shared > shared_limit * 1024:
            problems.append(f"shared memory over {shared_limit} KiB")
        found = _compile.Compiled(registers, spills, 0, compiled.metadata.shared, 0.0, tuple(products), False)
        return {**asdict(row), "tile": tile, **asdict(found), "problems": problems}
    found = _compile.inspect(compiled, warps, rows * keys)
    # Few rows: no warpgroup's product.
    expected = DEFAULT if row.kernel in ("moments", "finish") else EXPECTED.get(row.capability, DEFAULT)
    problems = []
    if not {name.split(".")[0] for name in found.mma} & expected:
        problems.append(f"no {' or '.join(sorted(expected))}")
    if found.loop_spills:
        problems.append(f"{found.loop_spills} spills in a loop")
    if found.shared > shared_limit * 1024:
        problems.append(f"shared memory over {shared_limit} KiB")
    if found.serialized:
        problems.append("wgmma is serialised")
    return {**asdict(row), "tile": tile, **asdict(found), "problems": problems}


def line_of(result: dict) -> str:
    """One line of the table, in the columns of the attention kernel's."""
    tile = result["tile"]
    name = f"{tile['rows']}x{tile['keys']} w{tile['warps']} st{tile['stages']}"
    spills = f"{result['loop_spills']}+{result['spills'] - result['loop_spills']}"
    return (
        f"{result['capability']:<4} {result['dim']:<4} {'16bit':<10} {result['kernel']:<7} {name:<15} "
        f"{result['registers']:<5} {spills:<7} {result['shared'] // 1024:<4} {result['slots']:<6.1f} "
        + ", ".join(result["mma"])
        + "".join(f"  PROBLEM: {problem}" for problem in result["problems"])
    )
