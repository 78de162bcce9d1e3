"""A user who reads Chinese is told everything in Chinese; what programs read stays English."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from comfyui_paro.scripts.comfy_server import ComfyError
from comfyui_paro.tests.host.mistakes import FAILED, REFUSED, TOLD
from comfyui_paro.tests.host.test_server import SMALL, SPARSE, clear, graph, report

CHINESE = re.compile(r"[\u4e00-\u9fff]")
PROGRESS_TEXT = (3).to_bytes(4, "big")


@pytest.fixture
def chinese(server):
    """The page's setting, as the page stores it."""
    server.json("/settings/Comfy.Locale", "zh")
    yield server
    server.json("/settings/Comfy.Locale", "")


@contextmanager
def page_of(server) -> Iterator[list[tuple[str, str]]]:
    """What a page that is open meanwhile is sent to show on nodes: (node, text)."""
    import asyncio

    import aiohttp

    seen, ready, over = [], threading.Event(), threading.Event()

    async def listen() -> None:
        url = f"{server.url}/ws?clientId={server.client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            ready.set()
            while not over.is_set():
                try:
                    message = await socket.receive(timeout=0.2)
                except asyncio.TimeoutError:
                    continue
                if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == PROGRESS_TEXT:
                    length = int.from_bytes(message.data[4:8], "big")
                    seen.append((message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()))

    thread = threading.Thread(target=lambda: asyncio.run(listen()))
    thread.start()
    try:
        assert ready.wait(30)
        yield seen
    finally:
        over.set()
        thread.join(30)


def test_a_run_tells_its_verdict_in_chinese(chinese):
    clear(chinese)
    with page_of(chinese) as seen:
        history = chinese.run(graph(SMALL, seed=61, settings=SPARSE))
        time.sleep(1)  # the last messages are under way
    text = chinese.text(history, "report")
    lines = [line for node, line in seen if node == "paro"]
    assert lines[0] == "第 1/3 步 · 400 个 token · 校准" and lines[1] == "第 2/3 步 · 400 个 token · 稀疏", lines
    assert lines[-1].startswith(f"{text.splitlines()[0]} · wan · 400 个 token"), lines
    assert ("report", text) in seen
    assert re.match(
        r"3 步中有 2 步稀疏，注意力误差 [\d.]+ %：由 PyTorch 参考实现计算，结果正确但没有加速（在 CPU 上）\n", text
    ), text
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
    assert chinese.text(history, "report") == ("未使用：不支持模型类 HomeMade；无需处理：支持的模型见 docs/models.md")


@pytest.mark.parametrize(
    "accepted, said",
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "范围 '3-1' 不是递增的；请写 1-3"),
        ("fr", "the range '3-1' does not rise; write 1-3"),
    ],
)
def test_until_it_is_set_the_language_is_the_browsers(server, accepted, said):
    """As in the page. One that PARO does not speak is English."""
    server.json("/settings/Comfy.Locale", "")
    body = json.dumps({"prompt": REFUSED["`dense_blocks` 3-1"].prompt}).encode()
    headers = {"Content-Type": "application/json", "Accept-Language": accepted}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/prompt", body, headers), timeout=60)
    assert said in json.dumps(json.loads(refused.value.read()), ensure_ascii=False)
