"""PARO Patch Model: MODEL in, faster MODEL out."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..paro_runtime.host.patching import patch_model
from ..paro_runtime.host.status import status_line
from ..paro_runtime.plan import Plan, PlanError
from ..paro_runtime.settings import Settings
from .schema import ALIASES, CATEGORY, SPEED, PlanType, SettingsType, schema
from .storage import plan_store

log = logging.getLogger("paro")
AUTO, REMEMBERED = "auto", "remembered"


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
                SettingsType.Input("settings", optional=True, tooltip="From PARO Settings; defaults without it."),
                PlanType.Input(
                    "plan", optional=True, tooltip="A plan straight from PARO Calibrate; it goes before plan_file."
                ),
            ],
            outputs=[io.Model.Output("patched", display_name="model", tooltip="The model with PARO, for the sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, plan_file: str | None = None) -> bool | str:
        # Naming plan_file lifts the host's list check on purpose: a workflow from another machine, whose plan file is
        # not here, runs and calibrates anew.
        try:
            _load(plan_file)
        except PlanError as error:
            return f"plan_file: {error}"
        return True

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
    ) -> io.NodeOutput:
        show = status_line(cls.hidden.unique_id)
        if not enabled:
            show("off: the model is unchanged")
            return io.NodeOutput(model)
        note = None
        remember = plan_file == REMEMBERED
        if plan is None and plan_file not in (AUTO, REMEMBERED):
            plan = _load(plan_file)
            if plan is None:
                note = f"plan_file: {plan_file} is not in models/paro; a plan is made on the way"
                log.warning("%s", note)
                show(note)
        settings, rest = settings or Settings(), {"store": plan_store(), "remember": remember}
        return io.NodeOutput(patch_model(model, settings, plan=plan, on_status=show, note=note, **rest))


def _load(name: str | None) -> Plan | None:
    """The plan, or None where no file is named and for one that is not there. Raises PlanError for a file it cannot
    use."""
    store = plan_store()
    if name in (None, AUTO, REMEMBERED) or store.locate(name) is None:
        return None
    return store.load(name)
