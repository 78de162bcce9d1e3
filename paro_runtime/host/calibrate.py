"""Deliberate calibration: sample one or more prompts densely, watch, and make a plan of what was seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..calibration import Calibrator
from ..plan import Plan, PlanError
from ..plan_store import PlanStore
from ..recipes import mask_options
from ..report import plan_picture
from ..settings import Settings, in_blocks, parse_blocks
from .families import family_of
from .patching import calibration_model, policy_for


@dataclass(frozen=True)
class Sampling:
    """How to sample, in the host's own terms; `latent` is the host's dict with `samples`."""

    latent: dict[str, Any]
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """A plan, the name of its file, a text for people and a picture `[1, H, W, 3]`."""

    plan: Plan
    file: str
    text: str
    picture: torch.Tensor


def calibrate(
    model: Any,
    negative: Any,
    positives: Sequence[Any],
    sampling: Sampling,
    *,
    settings: Settings,
    steps: str,
    store: PlanStore,
    name: str,
    on_status: Callable[[str], None],
) -> Calibration:
    """Sample every positive conditioning densely and make one plan of them all.

    steps  which steps to watch, such as "2, 5-8, -1"; empty for all.
    name   of the plan file; empty for the name under which PARO Patch Model finds it by itself.
    Raises PlanError for a model PARO does not know, SettingsError for a bad step list; the host's interrupt passes.
    """
    family = family_of(model.model.diffusion_model)
    if isinstance(family, str):
        raise PlanError(f"model: {family}")
    ranges = parse_blocks(steps, "calibrate_steps")
    policy = policy_for(model, family, settings)
    calibrator = Calibrator(policy.identity, mask_options(settings, policy.recipe))

    def wanted(total: int) -> frozenset[int] | None:
        return frozenset(i for i in range(total) if in_blocks(ranges, i, total)) if ranges else None

    watched = calibration_model(model, family, policy, calibrator, wanted, on_status)
    began = time.perf_counter()
    _sample_all(watched, negative, positives, sampling)
    seconds = time.perf_counter() - began
    made = {"by": "PARO Calibrate", "prompts": len(positives), "steps": steps or "all", "sampled": sampling.steps}
    plan = calibrator.plan(made)
    file = store.save(plan, name or None).name
    on_status(f"saved {file} · density {plan.density:.2f} · attention kept {plan.mass_kept:.1%}")
    return Calibration(plan, file, _text(plan, file, len(positives), seconds), plan_picture(plan))


def _sample_all(model: Any, negative: Any, positives: Sequence[Any], sampling: Sampling) -> None:
    """One dense sampling per prompt, with one progress bar over all of them; the images are not kept."""
    import comfy.model_management
    import comfy.sample
    import comfy.utils

    latent = comfy.sample.fix_empty_latent_channels(model, sampling.latent["samples"])
    progress = comfy.utils.ProgressBar(sampling.steps * len(positives))
    for number, positive in enumerate(positives):

        def step_done(step: int, denoised: Any, x: Any, total: int, number: int = number) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update_absolute(number * total + step + 1, total * len(positives))

        seed = sampling.seed + number
        comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, seed, sampling.latent.get("batch_index")),
            sampling.steps,
            sampling.cfg,
            sampling.sampler_name,
            sampling.scheduler,
            positive,
            negative,
            latent,
            denoise=sampling.denoise,
            noise_mask=sampling.latent.get("noise_mask"),
            callback=step_done,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )


def _text(plan: Plan, file: str, prompts: int, seconds: float) -> str:
    orders = ", ".join(f"{heads} {name}" for name, heads in plan.orders_histogram().items())
    return "\n".join(
        [
            f"plan: {file}",
            f"model: {plan.identity.family} {plan.identity.architecture}, weights {plan.identity.weights}",
            f"tokens: {plan.layout.describe()}",
            f"sites: {len(plan.sites)}, density {plan.density:.3f}, attention kept {plan.mass_kept:.1%}",
            f"orders: {orders}",
            f"watched: {prompts} prompt(s), {plan.made['observations']} calls, {seconds:.1f} s of sampling",
        ]
    )
