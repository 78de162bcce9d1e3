"""What a model family tells the host part: how to recognise a model, where its tokens are, which calls are its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ....kernels.core.layout import TokenLayout
from ...plan.plan import Site

NO_BLOCK_KEYS = "this ComfyUI does not tell which block is running; 0.5.0 or newer is needed"
SECOND_CALL = "a second attention of the same length in one block"
BLOCKS_REPLACED = "another node replaces blocks, and this model does not tell which block is running"


@dataclass(frozen=True)
class ModelCall:
    """One evaluation of a model, as the host's APPLY_MODEL wrapper sees it.

    shape    of the latent, `[B, C, (F,) H, W]`; B counts the conditioning chunks. Packed latents are `[B, 1, N]`.
    text     of the text context, `[B, tokens, width]`, or None.
    extra    the model's other conditions by name (`ref_latents`, `context_latents`, ...).
    options  the evaluation's `transformer_options`.
    """

    shape: tuple[int, ...]
    text: tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def visual(self) -> tuple[int, ...]:
        """The latent's shape; of a packed latent (video and audio in one) that of its first stream, the video."""
        packed = self.extra.get("latent_shapes")
        return tuple(packed[0]) if packed else self.shape

    @property
    def text_tokens(self) -> int:
        """Tokens of the text context; 0 without one."""
        return 0 if self.text is None else self.text[1]


@dataclass(frozen=True)
class Place:
    """Where a self-attention call stands in its evaluation.

    options   the call's `transformer_options`.
    stream    which of the family's layouts has the call's length.
    earlier   calls of that stream before it, under the same block keys.
    position  attention calls of any kind before it, under the same block keys.
    """

    options: Mapping[str, Any]
    stream: int = 0
    earlier: int = 0
    position: int = 0


class Family:
    """One kind of model: one subclass, one object of it as `FAMILY` in a module of this folder, and one recipe.

    name     of the family in plans and recipes.
    classes  `module.Class` of the diffusion models that belong to it, subclasses not included.
    streams  name of each layout's sites where the host does not name the block type.
    """

    name: str
    classes: tuple[str, ...] = ()
    streams: tuple[str, ...] = ("block",)

    def recognise(self, model: Any) -> bool:
        """Whether the diffusion model is of this family, variants that are not supported included."""
        return class_path(model) in self.classes

    def refusal(self, model: Any) -> str | None:
        """Why this model of the family is left alone, or None. One line for the user."""
        return None

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | Sequence[TokenLayout] | str:
        """The tokens of the self-attention calls of this evaluation, one layout per stream of calls that differ in
        length, or a reason why there is no such layout."""
        raise NotImplementedError

    def first_query(self, layout: TokenLayout) -> int:
        """The first token that asks. Models that treat their context as fixed run the queries behind it alone: tokens
        before the first query have keys and values only."""
        return 0

    def counts(self, model: Any) -> tuple[int, ...] | None:
        """Self-attention calls of one evaluation, per stream, for models whose calls are numbered by counting them;
        None for models that name the running block."""
        return None

    def uncountable(self, call: ModelCall) -> str | None:
        """Why the calls of this evaluation cannot be numbered by counting them, or None."""
        replaced = (call.options.get("patches_replace") or {}).get("dit")
        return BLOCKS_REPLACED if replaced else None

    def key(self, options: Mapping[str, Any]) -> tuple[str, int] | None:
        """(block type, block index) of the running block as the host names it, or None where it does not."""
        return block_key(options)

    def site(self, place: Place) -> Site | str:
        """The site of a call that has a layout's length, or a reason why it is none."""
        key = self.key(place.options)
        if key is None:
            return NO_BLOCK_KEYS
        # Cross-attention has the same keys, and as many text tokens as a small video has tokens looks like self.
        return SECOND_CALL if place.earlier else Site(*key)


class CountedFamily(Family):
    """A model that does not name its blocks on every host version: calls are numbered in the order they come.

    The total is checked at the end of each evaluation, so a model that skips or adds a call is noticed.
    """

    def site(self, place: Place) -> Site | str:
        key = self.key(place.options)
        if key is None:
            return Site(self.streams[place.stream], place.earlier)
        if place.earlier:
            return SECOND_CALL
        # The same name as by counting, so that a plan serves host versions with and without a block index.
        return Site(key[0] if "block_type" in place.options else self.streams[place.stream], key[1])


def class_path(model: Any) -> str:
    """`module.Class` of a diffusion model; compiled models are looked through."""
    kind = type(getattr(model, "_orig_mod", model))
    return f"{kind.__module__}.{kind.__qualname__}"


def block_key(options: Mapping[str, Any]) -> tuple[str, int] | None:
    """(block type, block index) as the host names the running block, or None where it does not."""
    index = options.get("block_index")
    return None if index is None else (str(options.get("block_type", "block")), int(index))


def patches(extent: int, patch: int) -> int:
    """Patches that cover `extent` latent cells: the host pads to whole patches, and padded cells are real tokens."""
    return -(-extent // patch)


def grid_of(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """Token grid of a latent `[..., (F,) H, W]` for a patch of as many numbers; F is 1 for an image."""
    sizes = [patches(n, p) for n, p in zip(shape[-len(patch) :], patch, strict=True)]
    frames, height, width = (1, *sizes) if len(sizes) == 2 else sizes
    return frames, height, width


def tokens_of(latents: Sequence[Any] | None, patch: Sequence[int]) -> int:
    """Tokens of latents that stand one after another, each padded to whole patches by itself."""
    return sum(math.prod(grid_of(latent.shape, patch)) for latent in latents or ())


def not_a_video(name: str, shape: Sequence[int]) -> str:
    """The reason for a latent without a frame axis."""
    return f"{name}: expected a video latent [B, C, F, H, W], got {list(shape)}"


def not_an_image(name: str, shape: Sequence[int]) -> str:
    """The reason for a latent that is not one image."""
    return f"{name}: expected an image latent [B, C, H, W], got {list(shape)}"
