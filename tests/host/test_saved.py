"""What saved files tell of the runs behind them, through a real server: written by the host's own nodes, read back."""

from __future__ import annotations

import copy
import io
import json

import pytest
from comfyui_paro.paro_runtime import VERSION
from comfyui_paro.tests.host.test_server import SMALL, SPARSE, graph
from PIL import Image


def drawn(seed: int, *, settings: dict | None = None, prefix: str = "saved") -> dict:
    """The tiny model's clip, decoded and saved as PNG files."""
    nodes = graph(SMALL, seed=seed, settings=SPARSE if settings is None else settings)
    nodes["decode"] = {"class_type": "PARODemoDecode", "inputs": {"samples": ["sample", 0]}}
    nodes["png"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": prefix}}
    return nodes


def metadata(server, history: dict, node: str = "png") -> dict:
    """All that is written into the first picture of a node, parsed."""
    picture = Image.open(io.BytesIO(server.images(history, node)[0]))
    return {key: json.loads(text) for key, text in picture.info.items()}


def page_extra(inner: dict | None = None) -> dict:
    """What the page sends beside a prompt."""
    return {"extra_pnginfo": {"workflow": {"nodes": [], "extra": {"ds": {"scale": 1}, **(inner or {})}}}}


def sampled(history: dict) -> bool:
    remembered = [data["nodes"] for kind, data in history["status"]["messages"] if kind == "execution_cached"]
    return not any("sample" in nodes for nodes in remembered)


def test_a_picture_tells_what_made_it_and_compares_where_it_is_opened(server):
    nodes = drawn(21)
    first = server.run(nodes, extra=page_extra())
    found = metadata(server, first)
    (run,) = found["paro"]["runs"]
    report = json.loads(server.text(first, "json"))
    assert run["verdict"] == server.text(first, "report").splitlines()[0]
    assert (run["node"], run["version"], run["gpu"], run["precision"]) == ("sample", VERSION, "CPU", "int8")
    assert run["attention_error"] == report["attention_error"][0] and len(run["plan"]) == 16
    assert f"\n- {100 * run['density']:.1f} % of the blocks kept on average" in server.text(first, "report")
    assert (run["steps"], run["sparse_steps"], run["grid"]) == (3, 2, list(SMALL))
    # Within the workflow too, beside what was there: that is what the page opens and sends again.
    assert found["workflow"]["extra"] == {"ds": {"scale": 1}, "paro": found["paro"]}
    assert server.images(first, "report")  # previews have their own files

    # The host has the latent and does not sample again: the file tells the same.
    again = drawn(21, prefix="other")
    kept = server.run(again, extra=page_extra())
    assert not sampled(kept) and metadata(server, kept)["paro"] == found["paro"]

    # Opened here and run again: nothing differs, down to the plan.
    server.run(drawn(22), extra=page_extra())
    server.json("/free", {"free_memory": True, "unload_models": True})
    opened = {"extra_pnginfo": {"workflow": found["workflow"]}}
    second = server.run(nodes, extra=opened)
    assert sampled(second)
    told = server.text(second, "report")
    same = "all the same here, with the same weights and plan"
    assert told.splitlines()[-1] == f"- made with INT8 on CPU, PARO {VERSION}: {same}"
    assert metadata(server, second)["paro"]["runs"][0]["plan"] == run["plan"]


def test_a_file_of_another_machine_says_what_differs(server):
    nodes = drawn(23)
    found = metadata(server, server.run(nodes, extra=page_extra()))
    record = copy.deepcopy(found["paro"])
    record["runs"][0] |= {"precision": "fp8", "gpu": "NVIDIA H100 80GB HBM3", "version": "0.0.9", "plan": "0" * 16}
    server.json("/free", {"free_memory": True, "unload_models": True})
    history = server.run(nodes, extra=page_extra({"paro": record}))
    line = f"made with FP8 on NVIDIA H100 80GB HBM3, PARO 0.0.9: here INT8 on CPU, PARO {VERSION}, pixels may differ"
    assert sampled(history) and server.text(history, "report").splitlines()[-1] == f"- {line}"
    assert f"PARO: {line}" in server.log.read_text(errors="replace")
    assert metadata(server, history)["paro"]["runs"][0]["precision"] == "int8"  # of this run, not of the file
    # Another seed makes another picture: there is nothing to compare.
    other = server.run(drawn(24), extra=page_extra({"paro": record}))
    assert "made with" not in server.text(other, "report")


def test_without_paro_no_record_stays(server):
    """A workflow opened from a file with a record, PARO switched off: the new file must not tell of the old run."""
    nodes = drawn(25)
    found = metadata(server, server.run(nodes, extra=page_extra()))
    nodes["paro"]["inputs"]["enabled"] = False
    plain = metadata(server, server.run(nodes, extra={"extra_pnginfo": {"workflow": found["workflow"]}}))
    assert "paro" not in plain and plain["workflow"]["extra"] == {"ds": {"scale": 1}}


def test_every_run_of_a_prompt_is_told(server):
    """Two samplers, as a model for high and one for low noise."""
    nodes = drawn(26)
    half = {
        **nodes["sample"]["inputs"],
        "add_noise": "enable",
        "noise_seed": 26,
        "return_with_leftover_noise": "enable",
    }
    half = {key: value for key, value in half.items() if key not in ("seed", "denoise")}
    half |= {"steps": 6, "start_at_step": 0, "end_at_step": 3}
    nodes["sample"] = {"class_type": "KSamplerAdvanced", "inputs": half}
    low = {**half, "add_noise": "disable", "start_at_step": 3, "end_at_step": 6, "latent_image": ["sample", 0]}
    nodes["low"] = {"class_type": "KSamplerAdvanced", "inputs": low | {"return_with_leftover_noise": "disable"}}
    nodes["decode"]["inputs"]["samples"] = ["low", 0]
    runs = metadata(server, server.run(nodes, extra=page_extra()))["paro"]["runs"]
    assert [run["node"] for run in runs] == ["sample", "low"] and runs[0]["inputs"] != runs[1]["inputs"]


def test_videos_carry_the_record(server):
    pytest.importorskip("av")
    import av

    nodes = drawn(27)
    frames = {"images": ["decode", 0], "fps": 8.0}
    webp = {**frames, "filename_prefix": "clip", "lossless": False, "quality": 80, "method": "fastest"}
    nodes["webp"] = {"class_type": "SaveAnimatedWEBP", "inputs": webp}
    webm = {**frames, "filename_prefix": "clip", "codec": "vp9", "crf": 40.0}
    nodes["webm"] = {"class_type": "SaveWEBM", "inputs": webm}
    nodes["video"] = {"class_type": "CreateVideo", "inputs": frames}
    mp4 = {"video": ["video", 0], "filename_prefix": "clip", "format": "mp4", "codec": "h264"}
    nodes["mp4"] = {"class_type": "SaveVideo", "inputs": mp4}
    history = server.run(nodes, extra=page_extra())
    expected = metadata(server, history)["paro"]
    exif = Image.open(io.BytesIO(server.images(history, "webp")[0])).getexif()
    (text,) = [text for text in exif.values() if isinstance(text, str) and text.startswith("paro:")]
    assert json.loads(text.removeprefix("paro:")) == expected
    for node in ("webm", "mp4"):
        with av.open(io.BytesIO(server.images(history, node)[0])) as file:
            told = {key.lower(): value for key, value in file.metadata.items()}
        assert json.loads(told["paro"]) == expected, node


@pytest.mark.parametrize(
    "record", [None, 7, "x", [], {"runs": 7}, {"runs": [7, None]}, {"runs": [{"inputs": [], "gpu": {}}]}]
)
def test_a_record_that_is_none_costs_nothing(server, record):
    """Whoever made the file may have written anything."""
    nodes = drawn(28)
    history = server.run(nodes, extra=page_extra({"paro": record}))
    found = metadata(server, history)
    assert found["paro"]["runs"][0]["node"] == "sample" and found["workflow"]["extra"]["paro"] == found["paro"]


def test_prompts_of_programs_are_told_too(server):
    """Without a page there is no workflow, and no `extra_pnginfo` either."""
    found = metadata(server, server.run(drawn(29)))
    assert found["paro"]["runs"][0]["node"] == "sample" and "workflow" not in found
