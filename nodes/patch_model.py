"""PARO Patch Model: MODEL in, faster MODEL out."""

from __future__ import annotations

import asyncio
import logging

from comfy_api.latest import io

from ..paro_runtime.config.settings import PRECISION_NAMES, PRESET_NAMES, Settings
from ..paro_runtime.host.patching import patch_model
from ..paro_runtime.host.status import status_line
from ..paro_runtime.plan.plan import Plan, PlanError
from ..paro_runtime.report.reasons import OFF, not_used
from ..paro_runtime.report.sentences import say
from .errors import checked, told
from .schema import ALIASES, CATEGORY, DENSITY, SPEED, PlanType, SettingsType, density_input, schema
from .storage import plan_store, read_plan

log = logging.getLogger("paro")
AUTO, REMEMBERED = "auto", "remembered"
COPY = "copy the file there to use it"
DEFAULT = Settings()


class PAROPatchModel(io.ComfyNode):
    """Puts PARO on a clone of the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PAROPatchModel",
            display_name="PARO Patch Model",
            category=CATEGORY,
            search_aliases=[*ALIASES, *SPEED],
            description="Runs the model's self-attention block-sparse in 8 bits, each head in the token order that "
            "suits it. Every run calibrates on the way, on its own prompt and seed. "
            "Put it after the loader and LoRAs, before the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to speed up; a copy is patched."),
                io.Boolean.Input(
                    "enabled", default=True, tooltip="Off hands the model on unchanged: compare without rewiring."
                ),
                io.Combo.Input(
                    "plan_file",
                    options=[AUTO, REMEMBERED, *plan_store().names()],
                    default=AUTO,
                    tooltip="auto: every run makes its own plan on the way, so the same seed always gives the same "
                    "picture; a plan that PARO Calibrate made for this model and size is used instead. remembered: "
                    "the first run's plan is kept in models/paro for later ones, which are some percent faster. "
                    "A file is used where it fits the model.",
                ),
                io.Combo.Input(
                    "speed",
                    options=list(PRESET_NAMES),
                    default=DEFAULT.preset,
                    optional=True,
                    tooltip="How much of the attention is computed: quality keeps the most, fast the least; the "
                    "figures come from the model's recipe. custom takes the density below. Without PARO Settings only.",
                ),
                density_input(
                    "With the speed custom only: the share of attention blocks that is kept. Lower is faster and "
                    "further from the original result.",
                    optional=True,
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISION_NAMES),
                    default=DEFAULT.precision,
                    optional=True,
                    tooltip="Bit widths of the two matrix products: auto picks what suits the GPU, 16bit does not "
                    "quantise. Without PARO Settings only.",
                ),
                SettingsType.Input(
                    "settings", optional=True, tooltip="From PARO Settings: every choice, also those above."
                ),
                PlanType.Input(
                    "plan", optional=True, tooltip="A plan straight from PARO Calibrate; it goes before plan_file."
                ),
            ],
            outputs=[io.Model.Output("patched", display_name="model", tooltip="The model with PARO, for the sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    async def validate_inputs(cls, plan_file: str | None = None) -> bool | str:
        # Naming plan_file lifts the host's list check on purpose: a workflow from another machine, whose plan file is
        # not here, runs and calibrates anew. A large file takes a second, in which the server must answer others.
        return await asyncio.to_thread(checked, cls.hidden.unique_id, lambda: _load(plan_file, to_check=True))

    @classmethod
    def fingerprint_inputs(cls, plan_file: str | None = None, **others: object) -> str:
        """Changes when the chosen file does, so that a new plan under an old name is read."""
        path = None if plan_file in (None, AUTO, REMEMBERED) else plan_store().locate(plan_file)
        return "" if path is None else f"{path}:{path.stat().st_mtime_ns}"

    @classmethod
    def execute(
        cls,
        model: object,
        enabled: bool = True,
        plan_file: str = AUTO,
        settings: Settings | None = None,
        plan: Plan | None = None,
        speed: str = DEFAULT.preset,
        density: float = DENSITY,
        precision: str = DEFAULT.precision,
    ) -> io.NodeOutput:
        show = status_line(cls.hidden.unique_id)
        if not enabled:
            log.info("PARO: %s", not_used(OFF))
            show(not_used(OFF))
            return io.NodeOutput(model)
        with told(show):
            settings, note = _chosen(settings, speed, density, precision)
            if plan is None and plan_file not in (AUTO, REMEMBERED):
                plan = _load(plan_file, to_check=False)
                if plan is None:
                    missing = f"plan_file: {plan_file} is not in models/paro, so a plan is made on the way; {COPY}"
                    note = missing if note is None else say("{first}; {second}", first=missing, second=note)
            if note is not None:
                log.warning("PARO: %s", note)
                show(note)
            patched = patch_model(
                model, settings, plan=plan, store=plan_store(), remember=plan_file == REMEMBERED, on_status=show,
                note=note,
            )  # fmt: skip
            return io.NodeOutput(patched)


def _chosen(settings: Settings | None, speed: str, density: float, precision: str) -> tuple[Settings, str | None]:
    """The settings of a run, and a line about widgets that were changed and do not count. Raises SettingsError."""
    if settings is not None:
        changed = {"speed": speed != DEFAULT.preset, "density": density != DENSITY}
        changed["precision"] = precision != DEFAULT.precision
        names = [name for name, its in changed.items() if its]
        note = f"{', '.join(names)} not used, since PARO Settings is connected; set them there"
        return settings, note if names else None
    own = speed == "custom"
    note = None
    if not own and density != DENSITY:
        note = f"density {density:g} is not used, since speed is {speed}; set speed to custom to use it"
    return Settings(preset=speed, density=density if own else None, precision=precision).validated(), note


def _load(name: str | None, to_check: bool) -> Plan | None:
    """The plan, or None where no file is named and for one that is not there. Raises PlanError, which names the input
    and says what to do, for a file it cannot use."""
    if name in (None, AUTO, REMEMBERED):
        return None
    try:
        return read_plan(name, to_check=to_check)
    except PlanError as error:
        reason = str(error).removeprefix("plan: ").removeprefix("plan ")
        raise PlanError(f"plan_file: {reason}; choose another plan, or auto") from None
