"""One evaluation of a model inside ComfyUI: which of its attention calls are PARO's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..plan.plan import Site
from ..report.reasons import SKIPPED
from ..run.attempt import Attempt
from ..run.evaluation import Evaluation, one_line
from .attention_call import AttentionCall, key_bias
from .families import Family, Place

OPTIONS_KEY = "paro"
"""Under this key of `transformer_options`: the run (between evaluations) or the evaluation (inside one)."""


@dataclass(frozen=True, eq=False)
class Claim:
    """A call that is PARO's: its site, the additive bias per key `[B, L]` or None, and the stream it belongs to."""

    site: Site
    key_bias: torch.Tensor | None
    stream: int = 0


class Stream(NamedTuple):
    """evaluation: of the runtime. first: tokens of its layout in front that do not ask. blocks: how many transformer
    blocks there are, None where that is not known."""

    evaluation: Evaluation
    first: int
    blocks: int | None


class HostEvaluation:
    """Lives from APPLY_MODEL's begin to its end, in one thread; `transformer_options` carry it to the override.

    attempt      that the evaluations share.
    evaluations  one per stream of the family, in its order; streams differ in their length.
    counts       self-attention calls to come, per stream, for families that count them.
    uncountable  why calls cannot be counted in this evaluation, or None.
    """

    def __init__(
        self,
        attempt: Attempt,
        family: Family,
        *evaluations: Evaluation,
        counts: tuple[int, ...] | None = None,
        uncountable: str | None = None,
    ) -> None:
        self._attempt = attempt
        self._family = family
        self._evaluations = evaluations
        self._first_queries = [family.first_query(e.layout) for e in evaluations]
        self._streams: dict[tuple[int, int], int] = {}
        for stream, (evaluation, first) in enumerate(zip(evaluations, self._first_queries, strict=True)):
            length = evaluation.layout.length
            self._streams.setdefault((length - first, length), stream)
        self._counts = counts
        self._uncountable = uncountable
        self._counted = 0
        self._calls: Counter = Counter()
        self._positions: Counter = Counter()
        self._other_lengths: Counter = Counter()
        self._inside = False
        self.reached = True  # False: other nodes stand around the model, and none has called it so far

    def claim(self, call: AttentionCall) -> Claim | None:
        """PARO's claim on a call. Calls of other lengths (text, audio, cross-attention) pass in silence; one of the
        right length that is declined counts as a reason in the report."""
        if self._inside:
            return None
        key = self._family.key(call.options)
        position = self._positions[key]
        self._positions[key] += 1
        queries, keys = call.q.shape[2], call.k.shape[2]
        stream = self._streams.get((queries, keys))
        if stream is None:
            self._other_lengths[keys] += queries == keys
            return None
        site = self._family.site(Place(call.options, stream, self._calls[key, stream], position))
        self._calls[key, stream] += 1
        uncountable = self._uncountable if key is None else None
        self._counted += key is None and uncountable is None
        bias = key_bias(call.mask, call.q.shape[0], keys)
        match uncountable, site, call.exact, bias, _recording(call):
            case None, Site() as its_site, None, None | torch.Tensor() as its_bias, None:
                return Claim(its_site, its_bias, stream)
            case found:
                self._attempt.decline(next(reason for reason in found if isinstance(reason, str)))
                return None

    def stream_of(self, call: AttentionCall, claim: Claim) -> Stream:
        """Who answers the call."""
        blocks = call.options.get("total_blocks", self._counts and self._counts[claim.stream])
        return Stream(self._evaluations[claim.stream], self._first_queries[claim.stream], blocks)

    @contextmanager
    def without_claims(self) -> Iterator[None]:
        """No call is PARO's inside: what runs without PARO may itself lead back here, when another node wrapped PARO's
        override."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    @property
    def saw_nothing(self) -> bool:
        """Whether no attention came by, not even one that is not PARO's."""
        return not self._positions

    def trouble(self, where: str, error: Exception) -> None:
        """A call goes to the host because of an error of PARO's own, which is counted. Raises it with `strict`."""
        if self._attempt.strict:
            raise error
        self._attempt.log.log_once(where, error)
        self._attempt.count("fallbacks", f"{where}: {one_line(error)}")

    def end(self, attempt: int = 0) -> bool:
        """Close the evaluation; says so if its self-attention calls were not those expected. True: run it again."""
        if any(evaluation.end(attempt) for evaluation in self._evaluations):
            return True
        layouts = [e.layout for e in self._evaluations]
        if not self.reached:
            self._attempt.decline(SKIPPED)
        elif not self._calls:
            seen = ", ".join(map(str, sorted(+self._other_lengths))) or "none"
            expected = " or ".join(f"{layout.length} tokens ({layout.describe()})" for layout in layouts)
            self._attempt.decline(f"no self-attention over the {expected} expected; seen: {seen}")
        elif self._counted and self._counts is not None and self._counted != sum(self._counts):
            wanted = sum(self._counts)
            reason = f"{self._counted} self-attention calls where {wanted} were expected: sites are not certain"
            for evaluation in self._evaluations:
                evaluation.abandon(reason)
        return False


def _recording(call: AttentionCall) -> str | None:
    """PARO has no backward pass."""
    return "gradients are being recorded" if torch.is_grad_enabled() and call.q.requires_grad else None
