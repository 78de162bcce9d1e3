"""Wan 2.1 and 2.2: text, image and first-last-frame to video, TI2V-5B, Fun, Camera, Animate, S2V, HuMo, SCAIL."""

from __future__ import annotations

import math
from typing import Any

from ....kernels.core.layout import TokenLayout
from .base import Family, ModelCall, class_path, grid_of, not_a_video, patches, tokens_of

_PACKAGE = "comfy.ldm.wan."
_REFUSED = {"CausalWanModel": "the autoregressive Wan attends to a cache of earlier frames"}
_SUPPORTED = (
    "WanModel",
    "CameraWanModel",
    "AnimateWanModel",
    "WanAnimate2Model",
    "WanModel_S2V",
    "HumoWanModel",
    "SCAILWanModel",
    "SCAIL2WanModel",
    "WanDancerModel",
)


class Wan(Family):
    """Sequence: [reference frames] + video grid + [clips, references or poses]; self-attention first in every block."""

    name = "wan"

    def recognise(self, model: Any) -> bool:
        return class_path(model).startswith(_PACKAGE) and _variant(model) != "VaceWanModel"

    def refusal(self, model: Any) -> str | None:
        variant = _variant(model)
        if variant in _SUPPORTED:
            return None
        return _REFUSED.get(variant, f"the Wan variant {variant} is not supported yet")

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        if len(call.shape) != 5:
            return not_a_video("Wan", call.shape)
        if _variant(model) == "WanAnimate2Model" and call.extra.get("pose_latents") is not None:
            return "Wan Animate 2 attends frame by frame while its pose is on"
        f, h, w = grid_of(call.shape, model.patch_size)
        joined = call.extra.get("time_dim_concat")
        if joined is not None:
            if tuple(joined.shape[3:]) != tuple(call.shape[3:]):
                return "Wan: frames of another size are joined to the video"
            f += patches(joined.shape[2], model.patch_size[0])
        prefix, suffix = _context(model, call)
        return TokenLayout(prefix, (f, h, w), suffix)


def _variant(model: Any) -> str:
    return class_path(model).rpartition(".")[2]


def _context(model: Any, call: ModelCall) -> tuple[int, int]:
    """Tokens in front of the video and behind it."""
    reference = call.extra.get("reference_latent")
    variant = _variant(model)
    if variant in ("SCAILWanModel", "SCAIL2WanModel"):
        # Reference frames lie in front; the poses behind are a second video, often at half the size.
        poses = call.extra.get("pose_latents")
        behind = tokens_of(None if poses is None else [poses], model.patch_size)
        return tokens_of(None if reference is None else [reference], model.patch_size), behind
    if variant in ("WanModel_S2V", "HumoWanModel"):
        behind = 0 if reference is None else _uncovered(reference.shape, model.patch_size)
        motion = call.extra.get("reference_motion")
        return 0, behind + (_packed_motion(motion.shape) if variant == "WanModel_S2V" and motion is not None else 0)
    front = 0
    if reference is not None and getattr(model, "ref_conv", None) is not None:
        # Fun models put one reference frame, patched in two dimensions and without padding, in front.
        front = _uncovered(reference.shape, model.patch_size[1:])
    clips = call.extra.get("context_latents") if variant == "WanModel" else None
    return front, tokens_of(clips, model.patch_size)


def _uncovered(shape: tuple[int, ...], patch: tuple[int, ...]) -> int:
    """Tokens of a latent that the host patches without padding: cells beyond the last whole patch are dropped."""
    return math.prod(n // p for n, p in zip(shape[-len(patch) :], patch, strict=True))


def _packed_motion(shape: tuple[int, ...]) -> int:
    """Tokens of S2V's earlier frames: 1 frame at patch (1, 2, 2), 2 at (2, 4, 4), 16 at (4, 8, 8)."""
    h, w = shape[-2:]
    return sum(frames // t * (h // s) * (w // s) for frames, t, s in ((1, 1, 2), (2, 2, 4), (16, 4, 8)))


FAMILY = Wan()
