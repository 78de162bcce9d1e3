"""A real ComfyUI server in a process of its own, with a folder of its own, and a small client for it.

with ComfyServer(host, pack, folder) as server:
    history = server.run(graph)             # a graph in API format
    pictures = server.images(history)
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAUNCHER = Path(__file__).resolve().parent / "comfy_boot.py"
START_SECONDS = 180
FOLDERS = ("custom_nodes", "models/diffusion_models", "input", "output", "user")


class ComfyError(RuntimeError):
    """A server that did not start, or a graph that it refused or could not run; `details` is the server's answer."""

    def __init__(self, message: str, details: Any = None) -> None:
        super().__init__(message)
        self.details = details


class ComfyServer:
    """Starts on `with`, stops at its end.

    host    the ComfyUI checkout.
    pack    the node pack to load, or None for a server without it.
    folder  the server's own world: models, output, user data; made if missing, kept afterwards.
    cpu     False lets the server use a GPU.
    """

    def __init__(self, host: Path, pack: Path | None, folder: Path, *, cpu: bool = True, python: str = sys.executable):
        self.host = Path(host).resolve()
        self.pack = None if pack is None else Path(pack).resolve()
        self.folder = Path(folder).resolve()
        self.log = self.folder / "server.log"
        self._arguments = ["--cpu"] if cpu else []
        self._python = python
        self._process: subprocess.Popen | None = None
        self.client = uuid.uuid4().hex
        self.url = ""

    def __enter__(self) -> ComfyServer:
        for name in FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if self.pack is not None:
            _place(self.pack, self.folder / "custom_nodes" / "paro-attention")
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        arguments = ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(self.folder)]
        arguments += ["--use-pytorch-cross-attention", "--disable-auto-launch", "--disable-api-nodes"]
        command = [self._python, str(LAUNCHER), str(self.host), *arguments, *self._arguments]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def process_id(self) -> int:
        """Of the running server."""
        return self._process.pid

    def run(
        self, graph: dict, *, timeout: float = 600, waiting: Callable[[float], None] | None = None, extra: Any = None
    ) -> dict:
        """Run a graph and return its history entry. `waiting` is called with the seconds passed, a few times a second.

        Raises ComfyError with one line that names the node when the graph is refused or fails.
        """
        body = {"prompt": graph, "client_id": self.client, "extra_data": extra or {}}
        try:
            prompt_id = self.json("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
            raise ComfyError(_refusal(answer), answer) from None
        began = time.monotonic()
        while time.monotonic() - began < timeout:
            entry = self.json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and entry["status"]["status_str"] == "success":
                return entry
            if entry is not None:
                raise ComfyError(_failure(entry), entry)
            if self._process.poll() is not None:
                raise ComfyError(f"the server ended with code {self._process.returncode}; see {self.log}")
            if waiting is not None:
                waiting(time.monotonic() - began)
            time.sleep(0.2)
        raise ComfyError(f"no result within {timeout} s")

    def images(self, history: dict, node: str | None = None) -> list[bytes]:
        """The files of every picture that the run made (of one node), in order."""
        found = []
        for node_id, output in history["outputs"].items():
            for image in output.get("images", []) if node in (None, node_id) else []:
                query = urllib.parse.urlencode(image)
                with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as answer:
                    found.append(answer.read())
        return found

    def text(self, history: dict, node: str) -> str:
        """The text that a node showed."""
        return "".join(history["outputs"][node]["text"])

    def json(self, path: str, body: Any = None) -> Any:
        """GET, or POST with a body; the answer as JSON. Raises urllib's errors."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def _wait_until_up(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            if self._process.poll() is not None:
                tail = self.log.read_text(errors="replace").splitlines()[-5:]
                raise ComfyError(f"ComfyUI ended while starting: {' | '.join(tail)}")
            try:
                self.json("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        raise ComfyError(f"ComfyUI did not answer within {START_SECONDS} s; see {self.log}")


def _place(pack: Path, where: Path) -> None:
    """A link to the pack; a copy where links are not allowed (Windows without developer mode)."""
    if where.is_symlink():
        where.unlink()
    elif where.exists():
        shutil.rmtree(where)
    try:
        where.symlink_to(pack.resolve(), target_is_directory=True)
    except OSError:
        shutil.copytree(pack, where, ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__", "out*", ".cache"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _refusal(answer: dict) -> str:
    """One line from a refused graph: which node, which input, why."""
    for node_id, node in (answer.get("node_errors") or {}).items():
        for error in node["errors"]:
            return f"{node['class_type']} ({node_id}): {error['message']}: {error['details']}"
    return answer["error"]["message"]


def _failure(entry: dict) -> str:
    """One line from a run that failed."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return f"{data['node_type']} ({data['node_id']}): {data['exception_message'].strip()}"
    return f"the run ended as {entry['status']['status_str']}"
