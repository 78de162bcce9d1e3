"""The same seed sampled twice in the host, by the host's own sampler, timed, and both decoded and compared."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...paro_runtime.host.calibration_run import Sampling
from ...paro_runtime.host.patching import last_report, remove
from ...paro_runtime.host.wrappers import KEY, Lifecycle
from ...paro_runtime.report.reasons import hint_of
from ...paro_runtime.report.sentences import say
from ..errors import CompareError
from .compare import Figures, clips_of, measure, side_by_side
from .text import PLAIN, TWO_MODELS, Timed, labels, text

log = logging.getLogger("paro")
CLOCK = "paro_compare"
CALLBACK = 5
"""Where OUTER_SAMPLE has the callback: (noise, latent_image, sampler, sigmas, denoise_mask, callback, ...)."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Both latents as the host's dicts, a text, and a picture `[frames, H, W, 3]`, or None where nothing was decoded.

    video: whether the picture's frames follow each other in time.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    text: str
    picture: torch.Tensor | None
    video: bool


class Clock:
    """Wrappers of one sampling that measure it and look for a cancel at every step."""

    def __init__(self, on_step: Callable[[int, int, float], None]) -> None:
        """on_step: gets the number of steps done, of all, and the seconds since the first began."""
        self.loading = 0.0
        self.steps: list[float] = []
        self._on_step = on_step

    def prepare_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of PREPARE_SAMPLING, in which the host loads weights: the first of two runs alone waits for that."""
        began = now()
        try:
            return executor(*args, **kwargs)
        finally:
            self.loading += now() - began

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of OUTER_SAMPLE: the host's callback stays, ours is called after it."""
        given = kwargs.get("callback") if len(args) <= CALLBACK else args[CALLBACK]
        began = last = now()
        loaded = self.loading

        def step_done(step: int, denoised: Any, x: Any, total: int) -> None:
            import comfy.model_management

            nonlocal last
            if given is not None:
                given(step, denoised, x, total)
            current = now()
            # What was loaded meanwhile belongs to no step.
            self.steps.append(current - last - (0.0 if self.steps else self.loading - loaded))
            last = current
            self._on_step(step + 1, total, current - began)
            # The host looks for it too, but not in every version within a run, and not after the last step.
            comfy.model_management.throw_exception_if_processing_interrupted()

        if len(args) > CALLBACK:
            args = (*args[:CALLBACK], step_done, *args[CALLBACK + 1 :])
        else:
            kwargs["callback"] = step_done
        return executor(*args, **kwargs)


def now() -> float:
    """Seconds, once the device has done all that it was given."""
    import comfy.model_management

    wait = getattr(comfy.model_management, "synchronize", None)
    if wait is not None:
        wait()
    elif torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(
    model: Any,
    positive: Any,
    negative: Any,
    vae: Any,
    sampling: Sampling,
    *,
    other: Any = None,
    on_status: Callable[[str], None],
) -> Comparison:
    """Sample without PARO (or with `other`), then with `model`, decode both and compare them.

    Raises CompareError for what cannot be compared, before anything runs; the host's interrupt passes.
    """
    check(model, vae)
    names = PLAIN if other is None else TWO_MODELS
    latents, runs = [], []
    first = remove(model) if other is None else other
    for number, each in enumerate((first, model)):
        free_memory()
        progress = _progress(number + 1, names.labels[number], on_status)
        latent, timed = sample(each, positive, negative, sampling, progress)
        latents.append(latent)
        runs.append(timed)
    free_memory()
    on_status("decoding both")
    pictures, figures, trouble = None, None, ""
    try:
        reference, clips = (decode(vae, latent) for latent in latents)
        if reference.shape != clips.shape:
            raise ValueError(f"the results are of different sizes, {_size(reference)} and {_size(clips)}")
    except Exception as error:
        # Two long runs are done: they are not lost for a wrong VAE.
        if _no_memory(error):
            raise
        log.warning("PARO Compare: the results could not be decoded", exc_info=error)
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        trouble = f"No picture and no figures, connect the VAE that belongs to the model: {said}"
        size = None
    else:
        size = tuple(clips.shape[:4])
        on_status("comparing both")
        pictures = side_by_side(reference, clips, labels(names, *runs))
        figures = figures_of(clips, reference)
    how = say(
        "{steps} steps, {sampler}, {scheduler}, cfg {cfg:g}, denoise {denoise:g}, seed {seed}",
        steps=sampling.steps,
        sampler=sampling.sampler_name,
        scheduler=sampling.scheduler,
        cfg=sampling.cfg,
        denoise=sampling.denoise,
        seed=sampling.seed,
    )
    said = text(names, runs[0], runs[1], figures, compared=how, size=size, trouble=trouble)
    return Comparison(latents[0], latents[1], said, pictures, size is not None and size[1] > 1)


def check(model: Any, vae: Any) -> None:
    """Raises CompareError for inputs that make no comparison."""
    found = model.get_attachment(KEY)
    if found is None:
        raise CompareError(
            "model: PARO is not on this model, so there is nothing to compare: put PARO Patch Model before it and "
            "switch enabled on"
        )
    if not isinstance(found, Lifecycle):
        raise CompareError(
            f"model: PARO does not run on this model, so there is nothing to compare: {found}; {hint_of(found)}"
        )
    if not hasattr(vae, "decode") or getattr(vae, "first_stage_model", vae) is None:
        raise CompareError("vae: there is none in it; connect the VAE that belongs to the model, from Load VAE")


def sample(
    model: Any, positive: Any, negative: Any, sampling: Sampling, on_step: Callable[[int, int, float], None]
) -> tuple[dict[str, Any], Timed]:
    """One run of the host's own KSampler, and how long it took. The model itself gets nothing of it."""
    from comfy.patcher_extension import WrappersMP

    import nodes  # the host's

    clock, timed = Clock(on_step), model.clone()
    timed.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, CLOCK, clock.outer_sample)
    timed.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, CLOCK, clock.prepare_sampling)
    began = now()
    (latent,) = nodes.common_ksampler(
        timed,
        sampling.seed,
        sampling.steps,
        sampling.cfg,
        sampling.sampler_name,
        sampling.scheduler,
        positive,
        negative,
        sampling.latent,
        denoise=sampling.denoise,
    )
    seconds = now() - began - clock.loading
    return latent, Timed(seconds, clock.steps, last_report(model, latent["samples"]))


def decode(vae: Any, latent: dict[str, Any]) -> torch.Tensor:
    """A sampled latent as clips `[B, F, H, W, C]`; of one with sound the picture. ValueError where there is none."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        samples = samples.unbind()[0]
    return clips_of(vae.decode(samples), samples)


def figures_of(clips: torch.Tensor, reference: torch.Tensor) -> Figures:
    """The figures, computed on the host's device, or where there is no memory left on it beside the results."""
    import comfy.model_management

    interrupted = comfy.model_management.throw_exception_if_processing_interrupted
    try:
        return measure(clips, reference, device=comfy.model_management.get_torch_device(), between=interrupted)
    except Exception as error:
        if not _no_memory(error):
            raise
    return measure(clips, reference, between=interrupted)


def free_memory() -> None:
    """What a run left behind; weights stay, both runs have the same."""
    import comfy.model_management

    gc.collect()
    comfy.model_management.soft_empty_cache()


def _no_memory(error: Exception) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError)


def _progress(number: int, name: str, on_status: Callable[[str], None]) -> Callable[[int, int, float], None]:
    run = say("run {number} of 2 · {name}", number=number, name=name)
    on_status(run)

    def step_done(done: int, total: int, seconds: float) -> None:
        left = seconds * (total - done) / done
        step = {"step": done, "steps": total, "seconds": left}
        on_status(say("{run} · step {step}/{steps} · about {seconds:.0f} s left of it", run=run, **step))

    return step_done


def _size(clips: torch.Tensor) -> str:
    return " x ".join(map(str, clips.shape[1:4]))
