"""PARO Report: what a patched model did in its last run."""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io, ui

from ..paro_runtime.host.patching import last_report
from .schema import ALIASES, CATEGORY, schema

_EMPTY = torch.zeros(1, 64, 64, 3)


class PAROReport(io.ComfyNode):
    """The report of a patched model's last run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PAROReport",
            display_name="PARO Report",
            category=CATEGORY,
            search_aliases=[*ALIASES, "status", "statistics"],
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
        report = last_report(model, samples.get("samples"))
        if isinstance(report, str):
            # Not an error: it would take the pictures down with it.
            return io.NodeOutput(report, json.dumps({"reason": report}), _EMPTY, ui={"text": (report,)})
        picture = report.picture()
        if picture is None:
            picture = _EMPTY
        text = json.dumps(report.as_dict())
        shown = {"text": (text,), **ui.PreviewImage(picture, cls=cls).as_dict()}
        return io.NodeOutput(report.text(), text, picture, ui=shown)
