"""PARO Compare: the same seed without PARO and with it, side by side."""

from __future__ import annotations

import uuid

import comfy.samplers
import torch
from comfy_api.latest import io, ui

from ...paro_runtime.host.calibration_run import Sampling
from ...paro_runtime.host.language import for_user
from ...paro_runtime.host.status import status_line
from ..errors import told
from ..schema import ALIASES, CATEGORY, schema
from .compare import shrunk
from .in_host import Comparison, compare

_EMPTY = torch.zeros(1, 64, 64, 3)
SHOWN_WIDTH = 1536
"""Of a video on the node, in pixels; the output has every one."""
SHOWN_FPS = 8


class PAROCompare(io.ComfyNode):
    """Samples twice and compares."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        samplers = comfy.samplers.KSampler
        return schema(
            node_id="PAROCompare",
            display_name="PARO Compare",
            category=CATEGORY,
            search_aliases=[*ALIASES, "compare", "A/B", "benchmark", "PSNR", "SSIM", "difference"],
            description="Samples the same seed twice, first without PARO and then with it, and shows both: how much "
            "faster, how far apart, and side by side. Takes the place of the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The patched model, from PARO Patch Model; one run leaves PARO out."),
                io.Conditioning.Input("positive", tooltip="As for the sampler."),
                io.Conditioning.Input("negative", tooltip="As for the sampler."),
                io.Latent.Input("latent_image", tooltip="As for the sampler: the latent that both runs begin with."),
                io.Vae.Input("vae", tooltip="Decodes both results for the picture and the figures."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise of both runs.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps of each run."),
                io.Float.Input(
                    "cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance, as you generate."
                ),
                io.Combo.Input("sampler_name", options=samplers.SAMPLERS, tooltip="As you generate."),
                io.Combo.Input("scheduler", options=samplers.SCHEDULERS, tooltip="As you generate."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 only the last part of the schedule is sampled, as in image-to-image.",
                ),
                io.Model.Input(
                    "other",
                    optional=True,
                    tooltip="To compare two settings: this model runs first, in the place of the one without PARO.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "comparison", tooltip="Every frame without PARO, with it, and their difference, 8 times as bright."
                ),
                io.String.Output("report", tooltip="The result in a sentence, then one fact a line."),
                io.Latent.Output("dense", tooltip="The result without PARO, or of the other model."),
                io.Latent.Output("sparse", tooltip="The result with PARO."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: object,
        positive: object,
        negative: object,
        latent_image: dict,
        vae: object,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float = 1.0,
        other: object = None,
    ) -> io.NodeOutput:
        show = status_line(cls.hidden.unique_id)
        sampling = Sampling(latent_image, seed, steps, cfg, sampler_name, scheduler, denoise)
        with told(show):
            made = compare(model, positive, negative, vae, sampling, other=other, on_status=show)
        show(made.text)
        text = for_user(made.text)
        shown = {"text": (text,), **cls._shown(made)}
        picture = _EMPTY if made.picture is None else made.picture
        return io.NodeOutput(picture, text, made.first, made.second, ui=shown)

    @classmethod
    def _shown(cls, made: Comparison) -> dict:
        """The picture on the node: a video moves, pictures are files of their own."""
        if made.picture is None:
            return {}
        if not made.video:
            return ui.PreviewImage(made.picture, cls=cls).as_dict()
        name, how = f"paro_compare_{uuid.uuid4().hex[:8]}", {"lossless": False, "quality": 85, "method": 0}
        frames = shrunk(made.picture, SHOWN_WIDTH)
        saved = ui.ImageSaveHelper.save_animated_webp(frames, name, io.FolderType.temp, cls, SHOWN_FPS, **how)
        return ui.SavedImages([saved], is_animated=True).as_dict()
