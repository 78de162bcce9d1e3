"""PARO Check's part that knows the host: what model and latent say, what else is on the model, and present attention.

Nothing is sampled, no weight is loaded and the model is left as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend

from ...kernels.core.dispatch import resolve_precision
from ...kernels.core.layout import TokenLayout
from ...paro_runtime.config.recipes import mask_options, recipe_for
from ...paro_runtime.config.settings import Settings
from ...paro_runtime.host.override import SLOT, without_paro
from ...paro_runtime.host.patching import patch_model
from ...paro_runtime.host.wrappers import KEY, Lifecycle
from ...paro_runtime.plan.options import MaskOptions
from ...paro_runtime.plan.store import PlanStore
from ...paro_runtime.report.sentences import clipped, say
from ...paro_runtime.run.session import Session
from .check import Check, Kernels, check_kernels, outlook
from .machine import machine
from .measure import Method, Row, Size, measure, paro_methods
from .methods import Run, Unavailable, kitchen_int8, kitchen_sol, sage, sdpa
from .model import ModelSize, model_size
from .others import origin, others_on

log = logging.getLogger("paro")
T = TypeVar("T")
PARTS = 16
"""Of the progress bar: what is looked at, and as many methods as are measured."""
NO_GPU = "no GPU: times on a CPU say nothing about one"
# What is measured without a model: a usual size of large models of either kind.
USUAL_FAMILY, USUAL = "flux", Size(TokenLayout(0, (1, 128, 128)), 24, 128, torch.bfloat16)


@dataclass(frozen=True)
class Wanted:
    """What the user connected; everything may be missing. sigmas: they decide, else steps and denoise do."""

    model: Any = None
    latent: dict[str, Any] | None = None
    positive: Any = None
    settings: Settings | None = None
    sigmas: torch.Tensor | None = None
    steps: int = 20
    denoise: float = 1.0
    store: PlanStore | None = None


class Parts:
    """Parts of a check, each of which may fail by itself; the host's interrupt passes."""

    def __init__(self, total: int, on_status: Callable[[str], None]) -> None:
        import comfy.model_management
        import comfy.utils

        self.notes: list[str] = []
        self._bar, self._total = comfy.utils.ProgressBar(total), total
        self._on_status, self._last = on_status, ""
        self._interrupted = comfy.model_management.throw_exception_if_processing_interrupted
        self._stop = comfy.model_management.InterruptProcessingException

    def between(self, doing: str) -> None:
        """Called again and again: raises the host's interrupt, and tells what is being done."""
        self._interrupted()
        if doing != self._last:
            self._last = doing
            self._bar.update(1)
            self._on_status(say("checking: {part}", part=doing))

    def done(self) -> None:
        self._bar.update_absolute(self._total)

    def part(self, name: str, work: Callable[[], T]) -> T | None:
        """The part's result, or None and a note that says why there is none."""
        self.between(name)
        try:
            return work()
        except self._stop:  # an Exception in older hosts
            raise
        except Exception as error:  # a check that fails where something is amiss would be of no use
            log.warning("PARO Check: %s: %s", name, error, exc_info=error)
            self.notes.append(say("{name}: {error}", name=name, error=clipped(f"{type(error).__name__}: {error}", 200)))
            return None


def check(wanted: Wanted, on_status: Callable[[str], None]) -> Check:
    """Everything that can be said without sampling. Raises nothing but the host's interrupt."""
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    parts = Parts(PARTS, on_status)
    facts = {**(parts.part("this machine", lambda: machine(device)) or _unknown(device)), **_versions()}
    session, known = None, None
    if wanted.model is not None:
        known = parts.part("the model's size", lambda: model_size(wanted.model, wanted.latent, wanted.positive))
        session = parts.part("the run's settings", lambda: _session(wanted, parts))
    if known is not None:
        parts.notes.extend(known.notes)
    size = _size(known)
    run = None
    if session is not None and known is not None and known.layout is not None:
        run = parts.part("what a run would do", lambda: outlook(session, size, device, known.sites))
    options, precision = _options(session, device)
    kernels = parts.part(
        "PARO's kernels",
        lambda: check_kernels(size, device, precision, options, lambda: parts.between("PARO's kernels")),
    )
    density = run.density if run is not None and run.densities else options.density
    methods = _methods(wanted.model, size, precision, options, density)
    rows = parts.part("attention", lambda: _rows(methods, size, device, kernels, parts)) or ()
    others = () if wanted.model is None else parts.part("other nodes", lambda: tuple(others_on(wanted.model))) or ()
    parts.done()
    return Check(facts, kernels, run, size, rows, others, tuple(parts.notes))


def _unknown(device: torch.device) -> dict:
    names = ("gpu", "memory", "compute_capability", "driver", "torch", "cuda", "rocm")
    return {"device": str(device), **dict.fromkeys(names)}


def _versions() -> dict[str, str | None]:
    try:
        found = import_module("comfyui_version").__version__
    except ImportError:
        found = None
    return {"comfyui": found}


def _size(known: ModelSize | None) -> Size:
    """The call to measure: the model's, with what is not known of it filled up."""
    if known is None:
        return USUAL
    layout = known.layout or known.typical or USUAL.layout
    return Size(layout, known.heads or USUAL.heads, known.head_dim or USUAL.head_dim, known.dtype)


def _session(wanted: Wanted, parts: Parts) -> Session | None:
    """Of a run with this model, which does not begin; None, with a note, for a model that PARO leaves alone. Settings
    that are connected go before those of a PARO Patch Model."""
    model, found = wanted.model, wanted.model.get_attachment(KEY)
    if not isinstance(found, Lifecycle) or wanted.settings is not None:
        if found is None:
            parts.notes.append("PARO is not on this model: this is what PARO Patch Model would do with it")
        model = patch_model(model, wanted.settings or Settings(), store=wanted.store)
        found = model.get_attachment(KEY)
    if not isinstance(found, Lifecycle):
        parts.notes.append(say("the model: {reason}", reason=found))
        return None
    return found.start(_sigmas(wanted), model)


def _sigmas(wanted: Wanted) -> list[float]:
    if wanted.sigmas is not None and len(wanted.sigmas) > 1:
        return [float(sigma) for sigma in wanted.sigmas]
    import comfy.samplers

    how = {"sampler": "euler", "scheduler": "simple", "denoise": wanted.denoise}
    return comfy.samplers.KSampler(wanted.model, wanted.steps, "cpu", **how).sigmas.tolist()


def _options(session: Session | None, device: torch.device) -> tuple[MaskOptions, str]:
    """Of masks, and the precision on this device."""
    if session is None:
        recipe, settings = recipe_for(USUAL_FAMILY), Settings()
        return mask_options(settings, recipe), resolve_precision("auto", recipe.precision, device)
    recipe = session.policy.recipe
    return session.options, resolve_precision(session.settings.precision, recipe.precision, device)


def _methods(model: Any, size: Size, precision: str, options: MaskOptions, density: float) -> list[Method]:
    return [
        *_present(model),
        *paro_methods(size, precision, options, density, "triton"),
        Method("torch by FlashAttention", "other", sdpa(SDPBackend.FLASH_ATTENTION)),
        Method("torch by cuDNN", "other", sdpa(SDPBackend.CUDNN_ATTENTION)),
        Method("ComfyUI's INT8 attention", "other", kitchen_int8),
        Method(f"ComfyUI's sol_attn with {100 * density:.0f} % of blocks", "other", kitchen_sol(density), density),
        Method("SageAttention", "other", sage),
    ]


def _present(model: Any) -> Iterator[Method]:
    """What computes attention now: the host's function, and another node's on this model if there is one."""
    from comfy.ldm.modules import attention

    function = attention.optimized_attention
    name = getattr(function, "__name__", "its attention").removeprefix("attention_")
    yield Method(f"ComfyUI's attention now ({name})", "host", lambda q, k, v: _by_host(function, q, k, v, {}))
    options = {} if model is None else model.model_options.get("transformer_options", {})
    override = without_paro(options.get(SLOT))
    if override is not None:
        its = {SLOT: override}
        where = origin(override)
        yield Method(f"attention now on this model ({where})", "host", lambda q, k, v: _by_host(function, q, k, v, its))


def _by_host(function: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> Run:
    form = {"skip_reshape": True, "skip_output_reshape": True}
    return lambda: function(q, k, v, q.shape[1], **form, transformer_options=dict(options))


def _rows(
    methods: list[Method], size: Size, device: torch.device, kernels: Kernels | None, parts: Parts
) -> tuple[Row, ...]:
    import comfy.model_management

    if device.type != "cuda":
        return tuple(Row(each.name, each.kind, each.density, reason=NO_GPU) for each in methods)
    if kernels is None or not kernels.ready:
        methods = [_without_kernels(each) if each.kind == "paro" else each for each in methods]
    free = comfy.model_management.get_free_memory(device)
    try:
        return measure(methods, size, device, free, parts.between)
    finally:
        comfy.model_management.soft_empty_cache()


def _without_kernels(method: Method) -> Method:
    def refuse(q, k, v):
        raise Unavailable("PARO's kernels cannot be used now, see above")

    return Method(method.name, method.kind, refuse, method.density)
