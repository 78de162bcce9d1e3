"""Issue slots and occupancy of every tile as recorded, for `check_kernels.py`: none may get worse unnoticed.

The record is `bench/results/kernel_code.json`, for every version of Triton by itself, since compilers differ.
`bench/expected.py` reads it too.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

RECORD = Path(__file__).resolve().parent.parent / "bench" / "results" / "kernel_code.json"
# Of one multiprocessor, by compute capability: KiB of shared memory, warps and programs that it holds at most.
MULTIPROCESSORS = {
    80: (164, 64, 32), 86: (100, 48, 16), 89: (100, 48, 24), 90: (228, 64, 32), 100: (228, 64, 32), 120: (100, 48, 24),
}  # fmt: skip
# Every program takes this much shared memory beside what it asks for.
RESERVED_KIB = 1
# Registers of one of the four parts of a multiprocessor, and how many a warp takes at a time.
REGISTERS, REGISTER_UNIT, PARTS = 16384, 256, 4
# By so much a loop may grow before it counts as worse.
TOLERANCE = 0.02


def programs_of(result: dict) -> int:
    """Programs that a multiprocessor holds at once, by registers, shared memory, warps and their own limit."""
    kib, most_warps, most = MULTIPROCESSORS[result["capability"]]
    warps = result["tile"]["warps"]
    per_warp = -(-result["registers"] * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // per_warp * PARTS // warps
    by_memory = int(kib // (result["shared"] / 1024 + RESERVED_KIB))
    return min(by_registers, by_memory, most_warps // warps, most)


def key_of(result: dict) -> str:
    """Architecture, head dimension, precision and form of the call, whatever its tile."""
    form = result.get("form") or (f"list of {result['block_q']} rows" if result["block_q"] else "dense")
    return f"sm_{result['capability']} D{result['dim']} {result['precision']} {form}"


def entry_of(result: dict) -> dict:
    """What is recorded: slots per softmax element of the main loop, registers per thread, shared memory in KiB."""
    tile = result["tile"]
    keys = "2x64" if tile["pairs"] else "64"
    return {
        "tile": f"{tile['rows']}x{keys} w{tile['warps']} st{tile['stages']}",
        "slots": round(result["slots"], 2),
        "programs": programs_of(result),
        "registers": result["registers"],
        "shared": round(result["shared"] / 1024, 1),
    }


def read(version: str) -> dict[str, dict] | None:
    """Recorded entries of one version of Triton by `key_of`; None where nothing is recorded of it."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8")).get(version) if RECORD.exists() else None
    return recorded and recorded["tiles"]


def problems_of(result: dict, recorded: dict[str, dict]) -> list[str]:
    """What is worse than recorded by more than the tolerance, or that nothing is recorded."""
    before, now = recorded.get(key_of(result)), entry_of(result)
    if before is None:
        return ["not recorded, see --record"]
    found = []
    if result["slots"] > before["slots"] * (1 + TOLERANCE):
        found.append(f"{before['slots']:g} issue slots were recorded, of {before['tile']}")
    if now["programs"] < before["programs"]:
        found.append(f"{now['programs']} programs a multiprocessor, {before['programs']} recorded, of {before['tile']}")
    return found


def write(version: str, results: list[dict], whole: bool) -> None:
    """Records these results for one version of Triton; whole: they are all there are, and older entries go."""
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    kept = {} if whole else record.get(version, {}).get("tiles", {})
    tiles = {**kept, **{key_of(result): entry_of(result) for result in results}}
    record[version] = {"date": date.today().isoformat(), "tiles": tiles}
    parts = []
    for name, each in sorted(record.items()):
        lines = ",\n".join(f"   {json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted(each["tiles"].items()))
        parts.append(f' {json.dumps(name)}: {{"date": {json.dumps(each["date"])}, "tiles": {{\n{lines}\n }}}}')
    RECORD.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
