"""What the user chose. Option values are API: once shipped they stay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...kernels.core.precision import PRECISIONS

PRESET_NAMES = ("quality", "balanced", "fast", "custom")
PRECISION_NAMES = ("auto", *PRECISIONS)
BACKEND_NAMES = ("auto", "triton", "reference")
TAIL_NAMES = ("auto", "on", "off")
ORDER_NAMES = ("mass", "paper", "original")
BUDGET_NAMES = ("shared", "per_head")
DENSE_NAMES = ("auto", "host", "paro")
SCHEDULE_NAMES = ("falling", "constant")


class SettingsError(ValueError):
    """A setting that cannot be used; the message is one line and names the field and what is allowed."""


@dataclass(frozen=True)
class Settings:
    """One user's choices.

    preset          density and dense steps from the recipe, or `custom`.
    density         kept blocks / all blocks, 0 < density <= 1; None takes the preset's.
    precision       bit widths of the products; `auto` picks by GPU.
    dense_steps     first sampling steps that keep every block; None takes the recipe's.
    dense_blocks    transformer blocks that keep every block: "0, 1, -1, 47-49"; negative counts from the end.
    tail            whether dropped blocks are represented by pooled keys and values.
    order           how a head's order is chosen: by mass kept, by the paper's metric, or always the original.
    budget          one threshold over all heads and sites, or the same density for every head.
    dense_attention what computes dense steps: the host's attention, or PARO's kernel at density 1. `auto` takes what
                    was measured to be faster on this GPU at this length: cuDNN in place of torch's attention, and
                    PARO's kernel in a first step of pure noise but with the preset quality; else the host's.
    backend         Triton kernels, the PyTorch reference, or whichever fits the device.
    min_tokens      shorter sequences run on the host's attention; None takes the recipe's.
    calibrate       calibrate on the way when no plan fits; False passes through instead.
    strict          every fallback and every trouble of PARO's own is an error: for benchmarks. What PARO leaves to the
                    host by rule (other models, short sequences, masks, other GPUs) is none.
    verbose         log each reason every time, not once.
    recipe          a family whose recipe to use, or `auto` for the model's own.
    mass_target     share of the attention to keep, 0 to 1: the density is then what that takes, and `density` or the
                    preset's is the most it may be. 0 takes that density as it is.
    density_schedule falling: the first sparse steps keep more blocks and the last ones fewer, `density` being the
                    mean; constant: one mask for all steps.
    """

    preset: str = "balanced"
    density: float | None = None
    precision: str = "auto"
    dense_steps: int | None = None
    dense_blocks: str = ""
    tail: str = "auto"
    order: str = "mass"
    budget: str = "shared"
    dense_attention: str = "auto"
    backend: str = "auto"
    min_tokens: int | None = None
    calibrate: bool = True
    strict: bool = False
    verbose: bool = False
    recipe: str = "auto"
    mass_target: float = 0.0
    density_schedule: str = "falling"

    def validated(self) -> Settings:
        """Return self, or raise SettingsError naming the first field that cannot be used."""
        for name, allowed in (
            ("preset", PRESET_NAMES),
            ("precision", PRECISION_NAMES),
            ("tail", TAIL_NAMES),
            ("order", ORDER_NAMES),
            ("budget", BUDGET_NAMES),
            ("dense_attention", DENSE_NAMES),
            ("density_schedule", SCHEDULE_NAMES),
            ("backend", BACKEND_NAMES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise SettingsError(f"{name}: {_shown(value)} is none of {', '.join(allowed)}")
        if self.preset == "custom" and self.density is None:
            raise SettingsError("density: the preset custom needs a density between 0 and 1")
        if self.density is not None and not (
            isinstance(self.density, (int, float)) and math.isfinite(self.density) and 0 < self.density <= 1
        ):
            raise SettingsError(
                f"density: {_shown(self.density)} is no share; give a number above 0 and up to 1, such as 0.3"
            )
        if not (isinstance(self.mass_target, (int, float)) and 0 <= self.mass_target <= 1):
            raise SettingsError(
                f"mass_target: {_shown(self.mass_target)} is no share; give a number from 0 to 1, such as 0.97"
            )
        for name in ("dense_steps", "min_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise SettingsError(f"{name}: {_shown(value)} is not a whole number of 0 or more")
        for name in ("calibrate", "strict", "verbose"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise SettingsError(f"{name}: {_shown(value)} is neither true nor false")
        if not isinstance(self.recipe, str):
            raise SettingsError(f"recipe: {_shown(self.recipe)} is no text; give the name of a family, or auto")
        parse_blocks(self.dense_blocks)
        return self


def parse_blocks(text: str, field: str = "dense_blocks") -> tuple[tuple[int, int], ...]:
    """Ranges of numbers (both ends included) from "0, 1, -1, 47-49". Raises SettingsError naming `field` otherwise."""
    if not isinstance(text, str):
        raise SettingsError(f"{field}: {_shown(text)} is no text; write numbers with commas between, such as 0, 1")
    ranges = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = part[1:].partition("-")
        named = f"{field}: {_shown(part)}"
        try:
            start = int(part[0] + first)
            end = int(last) if dash else start
        except ValueError:
            raise SettingsError(
                f"{named} is not a number or a range; write numbers with commas between, such as 0, 1, 47-49"
            ) from None
        if dash and min(start, end) < 0:
            raise SettingsError(f"{named} is a range from the end; write its numbers, such as -3, -2, -1")
        if dash and start > end:
            raise SettingsError(f"{field}: the range {_shown(part)} does not rise; write {end}-{start}")
        ranges.append((start, end))
    return tuple(ranges)


def _shown(value: object) -> str:
    """A value within a sentence: the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def in_blocks(ranges: tuple[tuple[int, int], ...], index: int, total: int | None) -> bool:
    """Whether block `index` of `total` lies in the ranges; negative ends need `total` and never match without it."""
    for start, end in ranges:
        if start < 0:
            if total is not None and index == total + start:
                return True
        elif start <= index <= end:
            return True
    return False
