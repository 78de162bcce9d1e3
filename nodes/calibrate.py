"""PARO Calibrate: sample a few prompts with the statistics on, and get a better plan than one made in passing."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io, ui

from ..paro_runtime.config.settings import Settings, parse_blocks
from ..paro_runtime.host.calibration_run import Sampling, calibrate
from ..paro_runtime.host.language import for_user
from ..paro_runtime.host.status import status_line
from ..paro_runtime.plan.plan import PlanError
from .errors import checked, told
from .schema import ALIASES, CATEGORY, PlanType, SettingsType, advanced, schema
from .storage import plan_store


class PAROCalibrate(io.ComfyNode):
    """Runs the sampler densely and makes a plan of what passes by."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        more = [
            io.Conditioning.Input(
                f"positive_{n}",
                optional=True,
                tooltip="One more prompt to watch: a plan seen over several prompts hangs less on any one.",
            )
            for n in (2, 3, 4)
        ]
        return schema(
            node_id="PAROCalibrate",
            display_name="PARO Calibrate",
            category=CATEGORY,
            search_aliases=[*ALIASES, "calibration", "plan"],
            description="Samples with dense attention, watches every head, and saves a plan: order, kept blocks and "
            "tail per head. Not needed to use PARO, which calibrates on the way; useful for a plan over several "
            "prompts, to share one, or to see what the heads do.",
            inputs=[
                io.Model.Input("model", tooltip="The model to calibrate, with its LoRAs. PARO on it is ignored."),
                io.Conditioning.Input("positive", tooltip="The first prompt to watch."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, as for the sampler."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size to calibrate."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Noise of the first prompt; the others count on from it.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps, as you generate."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance, as you generate."),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.SAMPLER_NAMES, default="euler", tooltip="As you generate."
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="simple", tooltip="As you generate."
                ),
                advanced(
                    io.Float.Input,
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 only the last part of the schedule is sampled, as in image-to-image.",
                ),
                io.String.Input(
                    "calibrate_steps",
                    default="",
                    tooltip="The steps to watch, such as: 3, 8, 12-14, -1. Counted from 0, negative from the end. "
                    "Empty watches every step: the best plan, and the slowest run.",
                ),
                io.String.Input(
                    "plan_name",
                    default="",
                    tooltip="File name in models/paro. Empty: the name under which PARO Patch Model finds the plan "
                    "by itself.",
                ),
                SettingsType.Input(
                    "settings", optional=True, tooltip="Density, order, budget and tail of the plan. Defaults without."
                ),
                *more,
            ],
            outputs=[
                PlanType.Output("plan", tooltip="For the plan input of PARO Patch Model."),
                io.Image.Output("picture", tooltip="Order (colour) and density (brightness) of every head."),
                io.String.Output("report", tooltip="What was watched and what came of it."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, calibrate_steps: str | None = None) -> bool | str:
        # The page marks every input that is named here, whichever is wrong; the name of the plan is checked first
        # thing in the run.
        return checked(cls.hidden.unique_id, lambda: parse_blocks(calibrate_steps or "", "calibrate_steps"))

    @classmethod
    def execute(
        cls,
        model: object,
        positive: object,
        negative: object,
        latent_image: dict,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        calibrate_steps: str = "",
        plan_name: str = "",
        denoise: float = 1.0,
        settings: Settings | None = None,
        positive_2: object = None,
        positive_3: object = None,
        positive_4: object = None,
    ) -> io.NodeOutput:
        show = status_line(cls.hidden.unique_id)
        with told(show):
            _check_name(plan_name)
            made = calibrate(
                model,
                negative,
                [prompt for prompt in (positive, positive_2, positive_3, positive_4) if prompt is not None],
                Sampling(latent_image, seed, steps, cfg, sampler_name, scheduler, denoise),
                settings=settings or Settings(),
                steps=calibrate_steps,
                store=plan_store(),
                name=plan_name,
                on_status=show,
            )
        return io.NodeOutput(made.plan, made.picture, for_user(made.text), ui=ui.PreviewImage(made.picture, cls=cls))


def _check_name(name: str) -> None:
    """Raises PlanError, before anything is sampled, for a name that no file can have; empty is one of PARO's own."""
    try:
        if name:
            plan_store().path_to_write(name)
    except PlanError as error:
        reason = str(error).removeprefix("plan: ")
        raise PlanError(f"plan_name: {reason}; give a name such as my_plan, or none") from None
