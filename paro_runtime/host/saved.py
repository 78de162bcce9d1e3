"""The record of PARO's runs in what the host saves.

The host's nodes that save pictures and videos write every key of one dict that belongs to the prompt, `extra_pnginfo`.
It is kept here by prompt id from the moment the prompt comes in, and each run adds itself at its end: under the key
`paro`, and within the workflow, which the page opens from the file and sends again with the next prompt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import uuid
from collections import OrderedDict
from typing import Any
from weakref import WeakValueDictionary

from ..plan.plan import ModelIdentity
from ..report.record import compared, record_of
from ..report.report import Report

log = logging.getLogger("paro")
KEY = "paro"
KEPT_RUNS = 64
"""Runs that are remembered for prompts in which the host does not sample again, since it has the latent."""


class _Extra(dict):
    """A prompt's `extra_pnginfo`, which ordinary dicts cannot be held weakly as.

    made: the runs told by the file that the workflow was opened from. inputs: of each node, what tells whether it would
    do the same again. runs: by node, those of this prompt; done: nodes whose runs in it are its own.
    """

    made: list[dict[str, Any]]
    inputs: dict[str, str]
    runs: dict[str, list[dict[str, Any]]]
    done: set[str]


_prompts: WeakValueDictionary[str, _Extra] = WeakValueDictionary()
_known: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()


def keep_records() -> None:
    """Look at every prompt that comes in from now on; without a server there are none."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None:
        server.add_on_prompt_handler(on_prompt)


def on_prompt(data: dict[str, Any]) -> dict[str, Any]:
    """The host's handler of a prompt that was posted: `prompt`, `extra_data`, perhaps `prompt_id`."""
    try:
        _watch(data)
    except Exception as error:  # a prompt that is no prompt is the host's to refuse
        log.debug("PARO: this prompt's files get no record (%s: %s)", type(error).__name__, error)
    return data


def _watch(data: dict[str, Any]) -> None:
    graph, extra_data = data["prompt"], data.get("extra_data") or {}
    found = extra_data.get("extra_pnginfo") or {}
    made = _taken_out(found)
    if not made and not any(str(node.get("class_type")).startswith("PARO") for node in graph.values()):
        return
    extra = _Extra(found)
    extra.made, extra.inputs, extra.runs, extra.done = made, _signatures(graph), {}, set()
    for node, inputs in extra.inputs.items():
        if inputs in _known:
            extra.runs[node] = [{**run, "node": node} for run in _known[inputs]]
    _write(extra)
    data["extra_data"] = {**extra_data, "extra_pnginfo": extra}
    if not data.get("prompt_id"):
        data["prompt_id"] = str(uuid.uuid4())
    _prompts[data["prompt_id"]] = extra


def _taken_out(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of the file that was opened; they are not those of this prompt, so they do not stay."""
    record = found.pop(KEY, None)
    inner = found["workflow"].get("extra") if isinstance(found.get("workflow"), dict) else None
    if isinstance(inner, dict):
        record = inner.pop(KEY, record)
    runs = record.get("runs") if isinstance(record, dict) else None
    return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []


def _signatures(graph: dict[str, Any]) -> dict[str, str]:
    """Of every node a digest of its kind and inputs and of all that it hangs on, whatever the numbers of the nodes."""
    found: dict[str, str] = {}

    def of(name: str) -> str:
        if name not in found:
            found[name] = ""  # a loop is the host's to refuse
            given = graph[name].get("inputs", {})
            inputs = {key: [of(value[0]), value[1]] if linked(value) else value for key, value in given.items()}
            text = json.dumps([graph[name].get("class_type"), inputs], sort_keys=True)
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return found[name]

    def linked(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in graph

    for name in graph:
        of(name)
    return found


def add(report: Report, identity: ModelIdentity) -> str | None:
    """Record a run of the prompt that is being executed. Returns a line about how it differs from the one that the
    opened file tells of, where that had the same inputs. Never raises: without a record a picture is still one."""
    try:
        return None if report.facts.calibrating else _add(report, identity)
    except Exception as error:
        log.debug("PARO: this run is not recorded in what is saved (%s: %s)", type(error).__name__, error)
        return None


def _add(report: Report, identity: ModelIdentity) -> str | None:
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    extra = None if context is None else _prompts.get(context.prompt_id)
    if extra is None:
        return None
    node = context.node_id
    inputs = extra.inputs.get(node)
    run = {"node": node, "inputs": inputs, **record_of(report, identity, _comfyui())}
    if node not in extra.done:
        extra.done.add(node)
        extra.runs[node] = []
    extra.runs[node].append(run)
    _write(extra)
    if not inputs:
        return None
    _known[inputs] = extra.runs[node]
    _known.move_to_end(inputs)
    while len(_known) > KEPT_RUNS:
        _known.popitem(last=False)
    place = len(extra.runs[node]) - 1
    before = [made for made in extra.made if made.get("inputs") == inputs]
    return compared(before[place], run) if place < len(before) else None


def _write(extra: _Extra) -> None:
    """Every value is new: the host's server may be reading the ones before."""
    runs = [run for each in extra.runs.values() for run in each]
    if not runs:
        return
    extra[KEY] = {"runs": runs}
    workflow = extra.get("workflow")
    if isinstance(workflow, dict):
        inner = workflow.get("extra")
        workflow["extra"] = {**(inner if isinstance(inner, dict) else {}), KEY: {"runs": runs}}


def _comfyui() -> str | None:
    return getattr(sys.modules.get("comfyui_version"), "__version__", None)
