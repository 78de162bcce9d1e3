"""Errors of single calls are those of the methods that are named; toy sizes."""

import json

import pytest
import torch
from comfyui_paro.bench.large_wan import attention_error, call_methods, mechanisms, pack
from comfyui_paro.bench.large_wan.model import new_model
from comfyui_paro.bench.large_wan.train import TOY_CONFIG

HOW = call_methods.How("cpu", "reference", "16bit", repeats=1)


def judged(grid, densities):
    rows = []
    attention_error.judge_planted(grid, densities, HOW, torch.float32, rows.append)
    return {(row["method"], row["density"]): row for row in rows}


def test_every_block_is_exact_and_planted_heads_need_their_orders():
    found = judged((4, 8, 12), [0.3, 1.0])
    exact = [row["error"] for (_, density), row in found.items() if density == 1.0]
    assert len(exact) >= 4 and max(exact) < 1e-4
    ours, own = (found[f"PARO, {orders}", 0.3] for orders in ("all orders", "model's own order"))
    assert ours["error"] < 0.8 * own["error"]
    assert ours["error"] < 0.8 * found["block means, top-k, on PARO's kernel", 0.3]["error"]
    assert all(row["kept_density"] == pytest.approx(0.3, abs=0.06) for (_, d), row in found.items() if d == 0.3)


def test_a_missing_host_kernel_is_told_loudly(capsys):
    reason = attention_error.tell_what_is_missing("cpu")
    assert reason and f"NOT MEASURED: sol_attn: {reason}" in capsys.readouterr().err


def test_calls_of_the_bed_are_judged_under_a_plan_of_an_earlier_step(tmp_path):
    torch.manual_seed(0)
    state = new_model(TOY_CONFIG).state_dict()
    pack.pack(state, tmp_path / "w", {"step": "7", "clips": "70"}, fraction=0.0)
    setup = mechanisms.Setup(tmp_path / "w", (2, 8, 10), 2, 4, 2, "cpu", "reference", "16bit", repeats=1)
    text = attention_error.run(setup, [0.5], [1], [2, 3], tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    calls = {row["call"]: row["heads"] for row in rows}
    assert calls == {"layer 1, step 3 of 4": 2, "layer 1, step 4 of 4": 2, "planted": 12}
    assert text.splitlines()[0] == "| method | density | layer 1, step 3 of 4 | layer 1, step 4 of 4 | planted |"
    with pytest.raises(ValueError, match="must lie behind"):
        attention_error.run(setup, [0.5], [1], [1], tmp_path / "other.json")
    with pytest.raises(ValueError, match="layers"):
        attention_error.run(setup, [0.5], [2], [2], tmp_path / "other.json")
