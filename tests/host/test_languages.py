"""A user who reads Chinese is told everything in Chinese; what programs read stays English."""

from __future__ import annotations

import json
import re

import pytest
from comfyui_paro.paro_runtime.report.sentences import told
from comfyui_paro.scripts.comfy_server import ComfyError
from comfyui_paro.tests.host.mistakes import FAILED, REFUSED, TOLD
from comfyui_paro.tests.host.test_server import SMALL, SPARSE, clear, graph, report

CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture
def chinese(server):
    """The page's setting, as the page stores it."""
    server.json("/settings/Comfy.Locale", "zh")
    yield server
    server.json("/settings/Comfy.Locale", "en")


def shown(server, node: str) -> list[str]:
    """Lines on a node, which the server sends to the page alone: read from a websocket while `run` goes on."""
    raise NotImplementedError


def test_a_run_tells_its_verdict_in_chinese(chinese):
    clear(chinese)
    history = chinese.run(graph(SMALL, seed=61, settings=SPARSE))
    text = chinese.text(history, "report")
    assert re.match(r"3 步中有 2 步稀疏，注意力误差 [\d.]+ %：由 PyTorch 参考实现计算，结果正确但没有加速（在 CPU 上）\n", text), text
    assert "\n运行情况\n- wan，" in text and "- 2 步稀疏，1 步稠密" in text
    # What programs read, the console and the saved files are English.
    assert report(chinese, history)["plan_source"] == "calibrated on the way"
    log = chinese.log.read_text(errors="replace")
    assert "PARO: 2 of 3 steps sparse, attention error " in log and not CHINESE.search(log)


def test_mistakes_are_told_in_chinese(chinese):
    with pytest.raises(ComfyError) as refused:
        chinese.run(REFUSED["`dense_blocks` 3-1"].prompt)
    assert "dense_blocks：范围 '3-1' 不是递增的；请写 1-3" in str(refused.value)
    with pytest.raises(ComfyError) as failed:
        chinese.run(FAILED["PARO Compare without PARO on the model"].prompt)
    assert "模型：此模型上没有 PARO，没有可对比的内容：请在前面放置“PARO 模型补丁”" in str(failed.value)
    history = chinese.run(TOLD["a model PARO does not know"])
    assert chinese.text(history, "report") == (
        "未使用：不支持模型类 HomeMade；无需处理：支持的模型见 docs/models.md"
    )
