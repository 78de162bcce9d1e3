"""What a model family tells the host part: how to recognise a model, where its tokens are, which calls are its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...plan import Site
from ...tokens import TokenLayout


@dataclass(frozen=True)
class ModelCall:
    """One evaluation of a model, as the host's APPLY_MODEL wrapper sees it.

    shape    of the latent, `[B, C, (F,) H, W]`; B counts the conditioning chunks.
    text     of the text context, `[B, tokens, width]`, or None.
    extra    the model's other conditions by name (`ref_latents`, `context_latents`, ...).
    """

    shape: tuple[int, ...]
    text: tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Family(Protocol):
    """One kind of model. Adding a family is one module with one such object, and a line in `families/__init__.py`."""

    name: str
    """The family's name in plans and recipes."""

    def recognise(self, model: Any) -> bool:
        """Whether the diffusion model is of this family, variants that are not supported included."""

    def refusal(self, model: Any) -> str | None:
        """Why this model of the family is left alone, or None. One line for the user."""

    def layout(self, model: Any, call: ModelCall) -> TokenLayout | str:
        """The tokens of the self-attention calls of this evaluation, or a reason why there is no such layout."""

    def site(self, options: Mapping[str, Any], earlier: int) -> Site | str:
        """The site of a self-attention call, or a reason why the call is none.

        options  the call's `transformer_options`.
        earlier  calls of the right length that came before it, in this evaluation and under the same block keys.
        """


def class_path(model: Any) -> str:
    """`module.Class` of a diffusion model; compiled models are looked through."""
    kind = type(getattr(model, "_orig_mod", model))
    return f"{kind.__module__}.{kind.__qualname__}"


def block_key(options: Mapping[str, Any]) -> tuple[str, int] | None:
    """(block type, block index) as the host names the running block, or None where it does not."""
    kind, index = options.get("block_type"), options.get("block_index")
    return None if kind is None or index is None else (str(kind), int(index))


def patches(extent: int, patch: int) -> int:
    """Patches that cover `extent` latent cells: the host pads to whole patches, and padded cells are real tokens."""
    return -(-extent // patch)


NO_BLOCK_KEYS = "this ComfyUI does not tell which block is running; 0.5.0 or newer is needed"
