"""What `scripts/check_kernels.py` compares with: occupancy, what counts as worse, and that every tile is recorded."""

import json

import pytest
from comfyui_paro.kernels.core.precision import PRECISIONS
from comfyui_paro.scripts import _kernel_record as record

pytest.importorskip("triton")


def result(**changes) -> dict:
    tile = {"rows": 128, "pairs": False, "warps": 8, "stages": 3}
    return {
        "capability": 89, "dim": 128, "precision": "int8", "block_q": 128, "tile": tile, "registers": 255,
        "shared": 65536, "slots": 14.0, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "registers", "kib", "warps", "programs"),
    [
        (89, 255, 64, 8, 1),  # registers: two warps in each of four parts
        (90, 240, 104, 4, 2),  # registers and memory alike
        (90, 128, 104, 4, 2),  # memory: 105 KiB each of 228
        (90, 168, 128, 12, 1),
        (86, 64, 49, 4, 2),  # memory, with the KiB that every program costs: 50 + 50 of 100
        (86, 64, 49.5, 4, 1),
        (120, 32, 1, 16, 3),  # warps: 48
        (80, 32, 0, 1, 32),  # programs
    ],
)
def test_programs_of_a_multiprocessor(capability, registers, kib, warps, programs):
    tile = {"rows": 128, "pairs": False, "warps": warps, "stages": 3}
    each = result(capability=capability, registers=registers, shared=int(kib * 1024), tile=tile)
    assert record.programs_of(each) == programs


def test_worse_than_recorded_is_told():
    four = {"rows": 64, "pairs": False, "warps": 4, "stages": 3}
    recorded = {record.key_of(result()): record.entry_of(result(tile=four, registers=128, shared=40960))}
    assert record.problems_of(result(tile=four, registers=128, shared=40960, slots=14.2), recorded) == []
    (slots,) = record.problems_of(result(tile=four, registers=128, shared=40960, slots=14.3), recorded)
    assert slots == "14 issue slots were recorded, of 64x64 w4 st3"
    (programs,) = record.problems_of(result(), recorded)
    assert programs == "1 programs a multiprocessor, 2 recorded, of 64x64 w4 st3"
    assert record.problems_of(result(dim=64), recorded) == ["not recorded, see --record"]


def test_lists_and_dense_calls_of_one_tile_are_told_apart():
    listed, dense, form = result(), result(block_q=0), result(form="tail")
    assert len({record.key_of(each) for each in (listed, dense, form)}) == 3


def test_records_of_a_part_leave_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORD", tmp_path / "record.json")
    assert record.read("3.6.0") is None
    record.write("3.6.0", [result(), result(dim=64)], whole=True)
    record.write("3.7.1", [result(slots=15.0)], whole=True)
    record.write("3.6.0", [result(slots=13.0)], whole=False)
    assert record.read("3.6.0")[record.key_of(result())]["slots"] == 13.0 and len(record.read("3.6.0")) == 2
    record.write("3.6.0", [result()], whole=True)
    assert len(record.read("3.6.0")) == 1 and record.read("3.7.1")[record.key_of(result())]["slots"] == 15.0
    assert record.read("3.8.0") is None


def test_the_committed_record_has_every_tile():
    """With both versions of Triton that the kernels are checked with; nothing in it is of a tile that is gone."""
    from comfyui_paro.kernels.attention.gluon_sm90.launch import TRITON_VERSIONS
    from comfyui_paro.scripts import check_kernels

    rows = check_kernels.rows_to_check(False, list(check_kernels.CAPABILITIES))
    wanted = {record.key_of(vars(row)) for row in rows if check_kernels.is_recorded(vars(row))}
    for dim in (128, 64):
        for precision in ("fp8", "int8"):
            forms = ("tail", "list", "dense")
            wanted |= {f"sm_90 D{dim} {precision} gluon {form}" for form in forms}
    assert {name.split()[2] for name in wanted} >= set(PRECISIONS)
    found = json.loads(record.RECORD.read_text(encoding="utf-8"))
    assert set(found) >= set(TRITON_VERSIONS)
    for version in TRITON_VERSIONS:
        assert set(found[version]["tiles"]) == wanted, version
