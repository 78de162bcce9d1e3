"""PARO Settings: every choice in one place."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..paro_runtime.config.recipes import all_recipes
from ..paro_runtime.config.settings import (
    BACKEND_NAMES,
    BUDGET_NAMES,
    DENSE_NAMES,
    ORDER_NAMES,
    PRECISION_NAMES,
    PRESET_NAMES,
    TAIL_NAMES,
    Settings,
    parse_blocks,
)
from ..paro_runtime.host.status import status_line
from .errors import checked, told
from .schema import ALIASES, CATEGORY, DENSITY, SettingsType, advanced, density_input, schema

log = logging.getLogger("paro")
_DEFAULT = Settings()
BY_RECIPE = -1
"""The number that stands for "as the model's recipe says" in number widgets, which cannot be empty."""


class PAROSettings(io.ComfyNode):
    """Collects choices into one PARO_SETTINGS value."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PAROSettings",
            display_name="PARO Settings",
            category=CATEGORY,
            search_aliases=[*ALIASES, "density", "quantization", "preset"],
            description="How much attention PARO keeps, how precisely it computes, and what stays dense. "
            "Every input has a good default; without this node PARO Patch Model uses the same defaults.",
            inputs=[
                _combo(
                    "preset",
                    PRESET_NAMES,
                    "How much of the attention is computed: quality keeps the most, fast the least; the figures come "
                    "from the model's recipe. custom uses the density below.",
                ),
                density_input(
                    "Used with the preset custom only: the share of attention blocks that is kept. 1 keeps everything; "
                    "lower is faster and further from the original result."
                ),
                _combo(
                    "precision",
                    PRECISION_NAMES,
                    "Bit widths of the two matrix products. auto picks what suits the GPU; 16bit does not quantise; "
                    "fp8 and int8 are the usual ones; int4 saves memory, not time: no GPU that PARO runs on is faster "
                    "with it.",
                ),
                io.Int.Input(
                    "dense_steps",
                    default=BY_RECIPE,
                    min=BY_RECIPE,
                    max=10000,
                    tooltip="The first sampling steps keep everything, since they decide the composition. "
                    "-1 takes the recipe's number for this schedule.",
                ),
                advanced(
                    io.String.Input,
                    "dense_blocks",
                    default="",
                    tooltip="Transformer blocks that keep everything, such as: 0, 1, -1, 47-49. Negative numbers count "
                    "from the end. Empty takes the recipe's.",
                ),
                _combo(
                    "tail",
                    TAIL_NAMES,
                    "Whether dropped blocks are represented by one averaged key and value each. Costs little, keeps "
                    "much; auto turns it on.",
                    rare=True,
                ),
                _combo(
                    "order",
                    ORDER_NAMES,
                    "How each head's token order is chosen: mass keeps the most attention, paper uses the metric of "
                    "the PAROAttention paper, original never reorders.",
                    rare=True,
                ),
                _combo(
                    "budget",
                    BUDGET_NAMES,
                    "shared: heads that need more blocks get more. per_head: every head keeps the same share.",
                    rare=True,
                ),
                _combo(
                    "dense_attention",
                    DENSE_NAMES,
                    "What computes steps and blocks that keep everything: the host's attention (or another attention "
                    "node before this one), PARO's own kernel, or (auto) what was measured to be fastest on this GPU.",
                    rare=True,
                ),
                _combo(
                    "backend",
                    BACKEND_NAMES,
                    "auto uses the Triton kernels where the GPU runs them. reference is plain PyTorch: right, but "
                    "slow, for checking.",
                    rare=True,
                ),
                advanced(
                    io.Int.Input,
                    "min_tokens",
                    default=BY_RECIPE,
                    min=BY_RECIPE,
                    max=1_000_000,
                    tooltip="Below this many tokens dense attention is faster and PARO steps aside. -1: the recipe's.",
                ),
                advanced(
                    io.Boolean.Input,
                    "calibrate",
                    default=_DEFAULT.calibrate,
                    tooltip="Where no plan is given, make one on the way, in the last dense step or the first sparse "
                    "one. Off: use any plan that is found for this model and size, or run dense.",
                ),
                advanced(
                    io.Boolean.Input,
                    "strict",
                    default=_DEFAULT.strict,
                    tooltip="For tests: stop with an error where a call that should be sparse, or a plan, cannot be "
                    "had (no memory, a result that is not finite, no plan, any trouble of PARO's own). What is left to "
                    "ComfyUI by rule is no error: other models, short sequences, masks, GPUs without its kernels.",
                ),
                advanced(
                    io.Boolean.Input,
                    "verbose",
                    default=_DEFAULT.verbose,
                    tooltip="Log every reason every time instead of once.",
                ),
                _combo(
                    "recipe",
                    (_DEFAULT.recipe, *all_recipes()),
                    "Whose densities, dense steps and token floors to use. auto takes those of the model's own family.",
                    rare=True,
                ),
                advanced(
                    io.Float.Input,
                    "mass_target",
                    default=_DEFAULT.mass_target,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the attention to keep, such as 0.97. Each plan then keeps as few blocks as that "
                    "takes; the preset's density, or the custom one, becomes the most it may keep. 0: off.",
                ),
            ],
            outputs=[
                SettingsType.Output(
                    "settings", tooltip="For the settings input of PARO Patch Model and of PARO Calibrate."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, dense_blocks: str | None = None) -> bool | str:
        # The page marks every input that is named here, whichever is wrong; the others' bounds are the host's to check.
        return checked(cls.hidden.unique_id, lambda: parse_blocks(dense_blocks or "", "dense_blocks"))

    @classmethod
    def execute(cls, preset: str, density: float, dense_steps: int, **others: Any) -> io.NodeOutput:
        show = status_line(cls.hidden.unique_id)
        if preset != "custom" and density != DENSITY:
            note = f"density {density:g} is not used, since preset is {preset}; set preset to custom to use it"
            log.warning("PARO Settings: %s", note)
            show(note)
        min_tokens = others.pop("min_tokens", BY_RECIPE)
        settings = Settings(
            preset=preset,
            density=density if preset == "custom" else None,
            dense_steps=None if dense_steps == BY_RECIPE else dense_steps,
            min_tokens=None if min_tokens == BY_RECIPE else min_tokens,
            **others,
        )
        with told(show):
            return io.NodeOutput(settings.validated())


def _combo(name: str, options: tuple[str, ...], tooltip: str, rare: bool = False) -> io.Combo.Input:
    """A combo of API values with the default of `Settings`; rare ones may be left out of a workflow."""
    values = {"options": list(options), "default": getattr(_DEFAULT, name), "tooltip": tooltip}
    return advanced(io.Combo.Input, name, **values) if rare else io.Combo.Input(name, **values)
