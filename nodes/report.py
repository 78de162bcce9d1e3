"""PARO Report: what a patched model did in its last run."""

from __future__ import annotations

import json
import logging

from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker

from ..paro_runtime.host.language import for_user
from ..paro_runtime.host.patching import is_of_another_run, last_report
from ..paro_runtime.host.status import status_line
from ..paro_runtime.report.report import Report
from ..paro_runtime.report.sentences import joined
from .schema import ALIASES, CATEGORY, schema

log = logging.getLogger("paro")
UNKNOWN_LATENT = "Which run made this latent is not known: this is about the model's last one."


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
                io.String.Output("report", tooltip="What the run came to, then one fact a line."),
                io.String.Output("json", tooltip="The same for programs."),
                io.Image.Output("picture", tooltip="Token order (colour) and blocks kept (brightness) of every head."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> float:
        return float("nan")

    @classmethod
    def execute(cls, model: object, samples: dict) -> io.NodeOutput:
        # No report is not an error: it would take the pictures down with it.
        try:
            latent = samples.get("samples")
            found = last_report(model, latent)
            text, values, images, shown = _read(found, cls)
            if not isinstance(found, str) and is_of_another_run(model, latent):
                text = joined("\n\n", (text, UNKNOWN_LATENT))
        except Exception as error:
            log.error("PARO: the report cannot be shown", exc_info=error)
            text, values, images, shown = _read(f"The report cannot be shown ({type(error).__name__}: {error})", cls)
        # The page draws the text of progress on any node, the text of a result on none of ours.
        status_line(cls.hidden.unique_id)(text)
        text = for_user(text)
        return io.NodeOutput(text, values, shown, ui={"text": (text,), **images})


def _read(report: Report | str, node: type) -> tuple[str, str, dict, object]:
    """Text, JSON for programs, what the page shows, and the picture, of a report or of the reason why there is none.

    An empty list takes the picture of an earlier run away, and nothing that waits for a picture runs without one.
    """
    nothing: tuple[dict, object] = {"images": []}, ExecutionBlocker(None)
    if isinstance(report, str):
        return report, json.dumps({"reason": report}), *nothing
    picture = report.picture()
    images = nothing if picture is None else (ui.PreviewImage(picture, cls=node).as_dict(), picture)
    return report.text(), json.dumps(report.as_dict()), *images
