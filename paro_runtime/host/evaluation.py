"""One evaluation of a model inside ComfyUI: which of its attention calls are PARO's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..plan import Site
from ..session import Evaluation, Session
from .calls import AttentionCall, key_bias
from .families import Family
from .families.base import block_key

OPTIONS_KEY = "paro"
"""Under this key of `transformer_options`: the run (between evaluations) or the evaluation (inside one)."""


@dataclass(frozen=True, eq=False)
class Claim:
    """A call that is PARO's: its site and the additive bias per key `[B, L]`, or None."""

    site: Site
    key_bias: torch.Tensor | None


class HostEvaluation:
    """Lives from APPLY_MODEL's begin to its end, in one thread; `transformer_options` carry it to the override."""

    def __init__(self, session: Session, family: Family, evaluation: Evaluation) -> None:
        self._session = session
        self._family = family
        self._evaluation = evaluation
        self._calls: Counter = Counter()
        self._other_lengths: Counter = Counter()
        self._inside = False

    def claim(self, call: AttentionCall) -> Claim | None:
        """PARO's claim on a call. Calls of other lengths (text, audio, cross-attention) pass in silence; one of the
        right length that is declined counts as a reason in the report."""
        if self._inside or call.length is None:
            return None
        if call.length != self._evaluation.layout.length:
            self._other_lengths[call.length] += 1
            return None
        key = block_key(call.options)
        site = self._family.site(call.options, self._calls[key])
        self._calls[key] += 1
        bias = key_bias(call.mask, call.q.shape[0], call.length)
        reason = next((r for r in (site, call.exact, bias, _recording(call)) if isinstance(r, str)), None)
        if reason is not None:
            self._session.decline(reason)
            return None
        return Claim(site, bias)

    def attend(self, call: AttentionCall, claim: Claim, dense: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`[B, H, L, D]` in q's dtype. `dense` runs what would have run without PARO."""

        def outside() -> torch.Tensor:
            # What runs without PARO may itself lead back here, when another node wrapped PARO's override.
            self._inside = True
            try:
                return dense()
            finally:
                self._inside = False

        return self._evaluation.attend(
            claim.site,
            call.q,
            call.k,
            call.v,
            scale=call.scale,
            key_bias=claim.key_bias,
            dense=outside,
            blocks=call.options.get("total_blocks"),
        )

    def end(self) -> None:
        """Close the evaluation; says so if the model never ran an attention over the expected tokens."""
        layout = self._evaluation.layout
        if not self._calls:
            seen = ", ".join(map(str, sorted(self._other_lengths))) or "none"
            self._session.decline(
                f"no self-attention over the {layout.length} tokens expected ({layout.describe()}); seen: {seen}"
            )
        self._evaluation.end()


def _recording(call: AttentionCall) -> str | None:
    """PARO has no backward pass."""
    return "gradients are being recorded" if torch.is_grad_enabled() and call.q.requires_grad else None
