"""Nodes for the tiny bundled model, which has neither a text encoder nor a VAE, and one that reads a run's report."""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io, ui

from ..paro_runtime.host.patching import last_report
from .schema import CATEGORY, schema

DEMO = f"{CATEGORY}/demo"
# The words of tests/tiny_wan/data.py; repeated here because a node's schema must not import the test folder.
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = ("right-down", "left-down", "left-up", "right-up")
BACKGROUNDS = ("flat", "horizontal", "vertical", "checker")


def _data():
    """The tiny model's data module; imported when a demo node runs, not with the pack."""
    from ..tests.tiny_wan import data

    return data


class PARODemoConditioning(io.ComfyNode):
    """A prompt of three words for the tiny model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PARODemoConditioning",
            display_name="PARO Demo Prompt",
            category=DEMO,
            search_aliases=["PARO demo"],
            description="Prompts for the tiny video model that comes with the pack: no text encoder is needed.",
            inputs=[
                io.Combo.Input("shape", options=list(SHAPES), tooltip="The moving object."),
                io.Combo.Input("direction", options=list(DIRECTIONS), tooltip="Where it moves first."),
                io.Combo.Input("background", options=list(BACKGROUNDS), tooltip="The stripes behind it."),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The three words, for the sampler."),
                io.Conditioning.Output("negative", tooltip="The empty prompt, for the sampler."),
            ],
        )

    @classmethod
    def execute(cls, shape: str, direction: str, background: str) -> io.NodeOutput:
        data = _data()
        words, nothing = data.context_for(shape, direction, background), data.null_context()
        return io.NodeOutput([[words, {}]], [[nothing, {}]])


class PARODemoDecode(io.ComfyNode):
    """Latent of the tiny model -> frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PARODemoDecode",
            display_name="PARO Demo Decode",
            category=DEMO,
            search_aliases=["PARO demo"],
            description="Turns the tiny model's latent into grey frames: no VAE is needed.",
            inputs=[io.Latent.Input("samples", tooltip="The latent that the sampler made with the tiny model.")],
            outputs=[io.Image.Output("frames", tooltip="All frames of all clips, four pixels per latent cell.")],
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        data = _data()
        video = data.decode(data.from_host_latent(samples["samples"].float()))
        grey = (video.flatten(0, 1) + 1) / 2
        return io.NodeOutput(grey[..., None].expand(-1, -1, -1, 3).contiguous())


class PARODemoReport(io.ComfyNode):
    """The report of a patched model's last run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PARODemoReport",
            display_name="PARO Report",
            category=DEMO,
            search_aliases=["PARO demo", "PARO report"],
            description="What PARO did in the run that made this latent, as text and as a picture of its plan.",
            inputs=[
                io.Model.Input("model", tooltip="The patched model that the sampler used."),
                io.Latent.Input("samples", tooltip="The sampler's result: the report is read once it is there."),
            ],
            outputs=[
                io.String.Output("report", tooltip="One fact a line."),
                io.String.Output("json", tooltip="The same for programs."),
                io.Image.Output("picture", tooltip="Order (colour) and density (brightness) of every head."),
            ],
            is_output_node=True,
            # The same inputs may stand for a later run.
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> float:
        return float("nan")

    @classmethod
    def execute(cls, model: object, samples: dict) -> io.NodeOutput:
        report = last_report(model)
        if report is None:
            raise ValueError("model: no run of PARO to report; connect the output of PARO Patch Model")
        picture = report.picture()
        if picture is None:
            picture = torch.zeros(1, 64, 64, 3)
        text = json.dumps(report.as_dict())
        shown = {"text": (text,), **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(report.text(), text, picture, ui=shown)
