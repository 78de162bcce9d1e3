"""PARO Check: what would run here, and how fast, without sampling."""

from __future__ import annotations

import json

import torch
from comfy_api.latest import io, ui

from ...paro_runtime.config.settings import Settings
from ...paro_runtime.host.language import for_user
from ...paro_runtime.host.status import status_line
from ..schema import ALIASES, CATEGORY, SettingsType, schema
from ..storage import plan_store
from .chart import check_chart
from .in_host import Wanted, check
from .text import check_text


class PAROCheck(io.ComfyNode):
    """Looks at the machine and the model, and times one attention call by several methods."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PAROCheck",
            display_name="PARO Check",
            category=CATEGORY,
            search_aliases=[*ALIASES, "check", "diagnose", "doctor", "benchmark", "GPU", "测试"],
            description="Says without sampling whether PARO runs on this machine, what it would do with the model, and "
            "how long one attention call takes by PARO and by what else is installed.",
            inputs=[
                io.Model.Input(
                    "model", optional=True, tooltip="The model as for the sampler, with PARO Patch Model or without."
                ),
                io.Latent.Input("latent", optional=True, tooltip="The latent as for the sampler: it tells the size."),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="The prompt as for the sampler: it tells the length of the text."
                ),
                SettingsType.Input(
                    "settings", optional=True, tooltip="From PARO Settings. Without: those of PARO Patch Model."
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="The schedule of a custom sampler, in place of steps and denoise."
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps, as you generate."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 only the last part of the schedule is sampled, as in image-to-image.",
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="The result in a sentence, then one fact a line."),
                io.String.Output("json", tooltip="The same for programs, and to send with a question."),
                io.Image.Output("chart", tooltip="Milliseconds of each method, and the steps of the run."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> float:
        return float("nan")

    @classmethod
    def execute(
        cls,
        steps: int,
        denoise: float,
        model: object = None,
        latent: dict | None = None,
        positive: object = None,
        settings: Settings | None = None,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        show = status_line(cls.hidden.unique_id)
        found = check(Wanted(model, latent, positive, settings, sigmas, steps, denoise, plan_store()), show)
        told, chart = check_text(found), check_chart(found)
        show(told)
        text = for_user(told)
        shown = {"text": (text,), **ui.PreviewImage(chart, cls=cls).as_dict()}
        return io.NodeOutput(text, json.dumps(found.as_dict(), indent=1), chart, ui=shown)
