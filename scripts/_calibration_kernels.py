"""The kernels of calibration and correction, for `check_kernels.py`: what to compile and what must come out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

EXPECTED = {90: {"HGMMA"}, 100: {"UTCHMMA"}}
DEFAULT = {"HMMA"}
DIMS = (128, 64)


@dataclass(frozen=True)
class CalibrationRow:
    """One kernel to compile with bf16 inputs: `lse`, `blocks`, `rows`, `costs`, `dropped`, `correct`."""

    capability: int
    dim: int
    kernel: str


def rows_to_check(quick: bool, capabilities: list[int]) -> list[CalibrationRow]:
    """Every kernel at every head dimension; quick: the costs of blocks at D = 128, which is the tightest."""
    kernels = ("costs",) if quick else ("lse", "blocks", "rows", "costs", "dropped", "correct")
    return [
        CalibrationRow(c, d, kernel) for c in capabilities for d in (DIMS[:1] if quick else DIMS) for kernel in kernels
    ]


def compile_row(row: CalibrationRow, shared_limit: int) -> dict:
    """The figures of one kernel, and under `problems` what is wrong; shared_limit in KiB."""
    import _checkout
    import _compile

    _checkout.register()
    from comfyui_paro.kernels import triton_correction, triton_statistics, triton_tail

    pointers = dict.fromkeys(("Q", "K", "V", "out_high", "out_low", "mean_q", "mean_k", "mean_v"), "*bf16")
    floats = ("factors", "out", "lse", "pool_weights", "pooled_values", "costs", "sums", "masses", "mass")
    pointers |= dict.fromkeys(floats, "*fp32") | {"levels": "*u8", "q_block_of_row": "*i32"}
    pointers |= dict.fromkeys(("share", "scale_log2", "epsilon"), "fp32")
    constants: dict = {"PADDED_D": row.dim, "BIASED": False, "bias": None, "ACCUMULATE": False}
    if row.kernel in ("lse", "blocks"):
        tile = triton_statistics.statistics_tile((row.capability // 10, row.capability % 10), row.dim, wide=False)
        rows, keys, warps, stages = tile.rows, tile.keys, tile.warps, tile.stages
        kernel = {"lse": triton_statistics._row_logsumexp, "blocks": triton_statistics._block_statistics}[row.kernel]
        constants |= {"D": row.dim, "KEYS": keys, "PRECISION": "tf32", "key_bias": None, "stride_qd": 1, "stride_kd": 1}
        if row.kernel == "blocks":
            constants |= {"PER_BLOCK": 128, "KEYS": 64, "BLOCKS": keys // 64, "DETAILED": False}
            constants |= {"maximum": None, "small": None}
    elif row.kernel == "correct":
        rows, warps = triton_correction.correction_tile((row.capability // 10, row.capability % 10), row.dim)
        keys, stages = 64, triton_correction.STAGES
        kernel = triton_correction._corrections
        pointers |= {"tail_bias": "*fp32", "kept_words": "*i64"}
        pointers |= dict.fromkeys(("tables", "order_of_head", "heads"), "*i32")
        constants |= {"D": row.dim, "key_bias": None, "stride_kd": 1, "stride_vd": 1, "GROUPS_PER_BLOCK": 2}
        constants |= {"STAGES": stages}
    else:
        rows, keys, warps, stages = triton_tail.ROWS, 64, 4, triton_tail.STAGES
        names = {"rows": "_row_outputs", "costs": "_block_costs", "dropped": "_dropped_sums"}
        kernel = getattr(triton_tail, names[row.kernel])
        constants |= {"KEYS": keys, "PER_BLOCK": 16, "POOL": 64}
    constants["ROWS"] = rows
    wanted = set(kernel.arg_names)
    constants = {name: value for name, value in constants.items() if name in wanted}
    compiled = _compile.compile_kernel(kernel, pointers, constants, row.capability, warps, stages)
    found = _compile.inspect(compiled, warps, rows * keys)
    expected = EXPECTED.get(row.capability, DEFAULT)
    problems = []
    if not {name.split(".")[0] for name in found.mma} & expected:
        problems.append(f"no {' or '.join(sorted(expected))}")
    if found.loop_spills:
        problems.append(f"{found.loop_spills} spills in a loop")
    if found.shared > shared_limit * 1024:
        problems.append(f"shared memory over {shared_limit} KiB")
    if found.serialized:
        problems.append("wgmma is serialised")
    tile = {"rows": rows, "keys": keys, "warps": warps, "stages": stages}
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
