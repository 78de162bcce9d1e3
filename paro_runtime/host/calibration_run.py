"""Deliberate calibration: sample one or more prompts densely, watch, and make a plan of what was seen."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..calibration.calibrator import Calibrator
from ..config.recipes import mask_options, raised_density
from ..config.settings import Settings, SettingsError, in_blocks, parse_blocks
from ..plan.plan import Plan, PlanError
from ..plan.store import PlanStore
from ..report.picture import kept_text, plan_picture
from ..report.reasons import NO_CALL, words_of
from ..report.sentences import joined, say
from ..report.verdict import exact, most_common
from .families import family_of
from .patching import calibration_model, last_report, policy_for

UNFINISHED = "unfinished"
"""Folder beside the plans that keeps calibrations which were stopped."""


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
        raise PlanError(f"model: {family}, there is nothing to calibrate; docs/models.md lists what PARO knows")
    ranges = parse_blocks(steps, "calibrate_steps")
    _check_steps(ranges, sampling.steps)
    policy = policy_for(model, family, settings)
    options = mask_options(settings, policy.recipe)
    # Stopped halfway, the same calibration goes on where it was; another one starts anew.
    key = _digest(policy.identity, options, steps, sampling, positives)
    calibrator = Calibrator(policy.identity, options, partial=store.writable / UNFINISHED / key)

    def wanted(total: int) -> frozenset[int] | None:
        return frozenset(i for i in range(total) if in_blocks(ranges, i, total)) if ranges else None

    watched = calibration_model(model, family, policy, calibrator, wanted, on_status)
    every_step = frozenset(range(sampling.steps))
    missing = [n for n in range(len(positives)) if not calibrator.has(n, wanted(sampling.steps) or every_step)]
    began = time.perf_counter()
    _sample_prompts(watched, calibrator, negative, positives, missing, sampling, on_status)
    seconds = time.perf_counter() - began
    if not calibrator.sites:
        raise PlanError(_nothing_seen(watched))
    raised = raised_density(settings, policy.recipe, calibrator.layout.grid_tokens)
    if raised is not None:
        calibrator.options = replace(options, density=raised)
    made = {"by": "PARO Calibrate", "prompts": len(positives), "steps": steps or "all", "sampled": sampling.steps}
    plan = calibrator.plan(made)
    file = store.save(plan, name or None).name
    calibrator.forget_partial()
    held = {"kept": kept_text(plan), "share": exact(plan.mass_kept)}
    on_status(say("saved {file} · {kept}, {share} of the attention in them", file=file, **held))
    text = [*_text(plan, file, len(positives), seconds)]
    if len(missing) < len(positives):
        text.append(f"taken up again: {len(positives) - len(missing)} prompt(s) had been observed before")
    return Calibration(plan, file, joined("\n", text), plan_picture(plan))


def _check_steps(ranges: tuple[tuple[int, int], ...], total: int) -> None:
    """SettingsError for a step that a sampling of so many has not got: better before it than after it."""
    for start, end in ranges:
        beyond = next((step for step in (start, end) if not -total <= step < total), None)
        if beyond is not None:
            raise SettingsError(
                f"calibrate_steps: there is no step {beyond}; name steps from 0 to {total - 1}, "
                f"or from -{total} to -1, which count from the end"
            )


def _nothing_seen(model: Any) -> str:
    """Why a calibration that ran through has nothing to make a plan of."""
    report = last_report(model)
    reason = NO_CALL if isinstance(report, str) else most_common(report.passed + report.fallbacks) or NO_CALL
    return f"latent_image: {words_of(reason)}, nothing could be calibrated; use the size that you generate at"


def _digest(identity: Any, options: Any, steps: str, sampling: Sampling, positives: Sequence[Any]) -> str:
    """Names a calibration: equal for the same model, masks, schedule, size and prompts."""
    digest = hashlib.sha256(repr((identity, options, steps)).encode())
    schedule = (
        sampling.seed,
        sampling.steps,
        sampling.cfg,
        sampling.sampler_name,
        sampling.scheduler,
        sampling.denoise,
    )
    digest.update(repr((schedule, tuple(sampling.latent["samples"].shape))).encode())
    for positive in positives:
        for words, _ in positive:
            flat = words.detach().float().cpu().flatten()
            digest.update(repr((tuple(words.shape), flat.double().sum().item(), flat[:64].tolist())).encode())
    return digest.hexdigest()[:16]


def _sample_prompts(
    model: Any,
    calibrator: Calibrator,
    negative: Any,
    positives: Sequence[Any],
    numbers: Sequence[int],
    sampling: Sampling,
    on_status: Callable[[str], None],
) -> None:
    """One dense sampling per prompt of `numbers`, one progress bar over all of them; the images are not kept."""
    import comfy.model_management
    import comfy.sample
    import comfy.utils

    latent = comfy.sample.fix_empty_latent_channels(model, sampling.latent["samples"])
    progress = comfy.utils.ProgressBar(sampling.steps * len(numbers))
    began = time.perf_counter()
    for done, number in enumerate(numbers):
        calibrator.prompt = number

        def step_done(step: int, denoised: Any, x: Any, total: int, done: int = done) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            passed, whole = done * total + step + 1, total * len(numbers)
            progress.update_absolute(passed, whole)
            left = (time.perf_counter() - began) * (whole - passed) / passed
            on_status(f"prompt {done + 1}/{len(numbers)} · step {step + 1}/{total} · about {left:.0f} s left")

        seed = sampling.seed + number
        comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, seed, sampling.latent.get("batch_index")),
            sampling.steps,
            sampling.cfg,
            sampling.sampler_name,
            sampling.scheduler,
            positives[number],
            negative,
            latent,
            denoise=sampling.denoise,
            noise_mask=sampling.latent.get("noise_mask"),
            callback=step_done,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )


def _text(plan: Plan, file: str, prompts: int, seconds: float) -> Iterator[str]:
    yield say("plan: {file}", file=file)
    identity = {"family": plan.identity.family, "layers": plan.identity.architecture, "weights": plan.identity.weights}
    yield say("model: {family} {layers}, weights {weights}", **identity)
    yield say("tokens: {tokens}", tokens=plan.layout.describe())
    yield say(
        "{layers} attention layers: {kept}, {share} of the attention in them",
        layers=len(plan.sites),
        kept=kept_text(plan),
        share=exact(plan.mass_kept),
    )
    orders = ", ".join(f"{heads} {name}" for name, heads in plan.orders_histogram().items())
    yield say("token orders by heads: {orders}", orders=orders)
    yield say(
        "watched: {prompts} prompt(s), {calls} calls, {seconds:.1f} s of sampling",
        prompts=prompts,
        calls=plan.made["observations"],
        seconds=seconds,
    )
