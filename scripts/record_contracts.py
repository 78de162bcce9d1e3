"""Record how ComfyUI calls attention in every family into tests/unit/host/contracts: `scripts/record_contracts.py`.

Each file holds the attention calls of one evaluation of a tiny random model in the real sampler: shapes, strides,
positional and keyword arguments, the block keys, and the site that PARO gave the call. The unit tests replay them
without ComfyUI. Arguments: names of cases, default all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _checkout
from _host import find_host, host_version

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "unit" / "host" / "contracts"
# What the replay needs of `transformer_options`; the rest is the host's own business.
KEYS = ("block_type", "block_index", "total_blocks", "block", "img_slice", "grid_sizes", "reference_image_num_tokens")
NAMES = ("q", "k", "v")


class Recorder:
    """Stands in the override slot behind PARO, which hands every call of a dense step on to it."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.evaluation: Any = None
        self.claim: Any = None

    def watch(self, host_evaluation: type) -> None:
        """See every claim PARO makes; the call that follows it is recorded with its site."""
        original = host_evaluation.claim

        def claim(evaluation, call):
            self.evaluation = evaluation
            self.claim = original(evaluation, call)
            return self.claim

        host_evaluation.claim = claim

    def override(self, func, *args: Any, **kwargs: Any) -> Any:
        """The attention override."""
        self._record(args, kwargs, container=False)
        return func(*args, **kwargs)

    def container_function(self, *args: Any, **kwargs: Any) -> Any:
        """For calls whose tensors come in containers, which name no function to go on with."""
        from comfy.ldm.modules.attention import attention_pytorch

        tensors = [container.take() for container in args[:3]]
        self._record((*tensors, *args[3:]), kwargs, container=True)
        return attention_pytorch(*tensors, *args[3:], **kwargs)

    def _record(self, args: tuple, kwargs: dict, container: bool) -> None:
        options = kwargs.get("transformer_options") or {}
        call: dict[str, Any] = {name: _tensor(t) for name, t in zip(NAMES, args, strict=False)}
        call["positional"] = [_plain(value) for value in args[3:]]
        names = sorted(set(kwargs) - {"transformer_options", "_inside_attn_wrapper"})
        call["keywords"] = {name: _plain(kwargs[name]) for name in names}
        call["options"] = {key: _plain(options[key]) for key in KEYS if key in options}
        call["container"] = container
        call["site"] = None if self.claim is None else self.claim.site.name
        self.calls.append(call)


def _tensor(value: Any) -> dict:
    return {"shape": list(value.shape), "stride": list(value.stride())}


def _plain(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return list(value) if isinstance(value, (tuple, list)) else value


def record(case: Any, tiny: Any, version: str) -> dict:
    """The contract of one case: its first and its last run, one evaluation each."""
    from comfyui_paro.paro_runtime.config.settings import Settings
    from comfyui_paro.paro_runtime.host.claims import HostEvaluation
    from comfyui_paro.paro_runtime.host.patching import patch_model

    model, runs = tiny.build(case), []
    original = HostEvaluation.claim
    for run in dict.fromkeys((case.runs[0], case.runs[-1])):
        recorder = Recorder()
        recorder.watch(HostEvaluation)
        clone = model.clone()
        slot = _Override(recorder.override, recorder.container_function)
        clone.model_options["transformer_options"]["optimized_attention_override"] = slot
        tiny.sample(patch_model(clone, Settings(preset="custom", density=1.0, dense_steps=9)), case, run)
        HostEvaluation.claim = original
        layouts = [e.layout for e in recorder.evaluation._evaluations]
        evaluations = len(recorder.calls) // _period(recorder.calls)
        runs.append(
            {
                "layouts": [[layout.prefix, list(layout.grid), layout.suffix] for layout in layouts],
                "counts": recorder.evaluation._counts,
                "calls": recorder.calls[: len(recorder.calls) // evaluations],
            }
        )
    return {"case": case.name, "family": case.family, "host": version, "runs": runs}


class _Override:
    """A callable with the attribute that the host looks for."""

    def __init__(self, function: Any, container_function: Any) -> None:
        self.function = function
        self.container_function = container_function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _period(calls: list[dict]) -> int:
    """Calls of one evaluation: the shortest sequence that all calls repeat."""
    for length in range(1, len(calls) + 1):
        if len(calls) % length == 0 and calls == calls[:length] * (len(calls) // length):
            return length
    return len(calls)


def dump(contract: dict) -> str:
    """JSON with one call a line."""
    text = json.dumps({**contract, "runs": []}, indent=1)
    runs = []
    for run in contract["runs"]:
        calls = ",\n    ".join(json.dumps(call) for call in run["calls"])
        head = json.dumps({"layouts": run["layouts"], "counts": run["counts"]})[:-1]
        runs.append(f'  {head}, "calls": [\n    {calls}\n  ]}}')
    return text.replace('"runs": []', '"runs": [\n' + ",\n".join(runs) + "\n ]") + "\n"


def main() -> None:
    """Record the named cases, or all."""
    _checkout.register()
    host = find_host()
    if host is None:
        raise SystemExit("no ComfyUI found; set COMFYUI_PATH")
    from comfyui_paro.scripts.comfy_boot import boot

    boot(host)
    from comfyui_paro.tests.host import tiny_families as tiny
    from comfyui_paro.tests.host.cases_image import CASES as IMAGES
    from comfyui_paro.tests.host.cases_video import CASES as VIDEOS

    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in (*VIDEOS, *IMAGES):
        if not sys.argv[1:] or case.name in sys.argv[1:]:
            contract = record(case, tiny, host_version(host))
            (FOLDER / f"{case.name}.json").write_text(dump(contract), encoding="utf-8")
            print(case.name, [len(run["calls"]) for run in contract["runs"]], flush=True)


if __name__ == "__main__":
    main()
