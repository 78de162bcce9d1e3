"""The function that ComfyUI calls in place of every attention of a patched model.

It owns nothing and decides little: a call that carries a running evaluation in its `transformer_options`, and that the
evaluation recognises as one of its self-attention calls, goes to the session; every other call goes, with its own
arguments untouched, to what would have run without PARO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F

from .attention_call import AttentionCall, options_of, read_call
from .claims import OPTIONS_KEY, Claim, HostEvaluation

SLOT = "optimized_attention_override"
# The host's function that runs torch's attention; its others are chosen by users, for what they are.
HOST_SDPA = "attention_pytorch"

Attention = Callable[..., torch.Tensor]


class Override(Protocol):
    """What `make_override` makes. paro_previous: the override that it stands before, or None."""

    paro_previous: Attention | None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...


def make_override(previous: Attention | None) -> Override:
    """The override that stands before `previous` (another node's override), or before the host's own attention."""
    alone = without_paro(previous) is None

    def paro_attention(func: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
        def dense() -> torch.Tensor:
            return run_host(func, previous, args, kwargs)

        ours = _ours(args, kwargs)
        if ours is None:
            return dense()
        return _attend(ours, dense, alone and getattr(func, "__name__", "") == HOST_SDPA)

    # Step-dependent choices inside a compiled graph would be frozen at trace time: the host's compile node drops every
    # guard on transformer_options.
    override = torch.compiler.disable(paro_attention)
    override.paro_previous = previous
    container_function = getattr(previous, "container_function", None)
    if container_function is not None:
        override.container_function = _container_function(container_function)
    return override


def run_host(func: Attention, previous: Attention | None, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """What would have run without PARO."""
    return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)


def _container_function(previous: Attention) -> Attention:
    """The form for calls whose tensors come in containers. The host gives it no `func`: only another node's container
    function can run what PARO declines, so it is offered only where there is one. Without it the host unwraps."""

    def paro_container_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        ours = _ours(args, kwargs)
        if ours is None:
            return previous(*args, **kwargs)
        # The call's views keep the tensors alive, so each dense fallback gets containers of its own.
        kinds, tensors = [type(c) for c in args[:3]], [c.take() for c in args[:3]]

        def dense() -> torch.Tensor:
            containers = [kind(tensor) for kind, tensor in zip(kinds, tensors, strict=True)]
            return previous(*containers, *args[3:], **kwargs)

        return _attend(ours, dense, plain=False)

    return torch.compiler.disable(paro_container_attention)


def is_override(function: object) -> TypeGuard[Override]:
    """Whether `function` was made here."""
    return hasattr(function, "paro_previous")


def without_paro(function: Attention | None) -> Attention | None:
    """The override that was in the slot before PARO's, if PARO's is there now."""
    while function is not None and is_override(function):
        function = function.paro_previous
    return function


def _ours(args: tuple, kwargs: dict[str, Any]) -> tuple[HostEvaluation, AttentionCall, Claim] | None:
    """The running evaluation, the call and the evaluation's claim on it; None where there is no claim."""
    evaluation = options_of(kwargs).get(OPTIONS_KEY)
    if not isinstance(evaluation, HostEvaluation):
        return None
    try:
        call = read_call(*args, **kwargs)
        claim = None if call is None else evaluation.claim(call)
    except Exception as error:
        # What other nodes put into the options is theirs: a block's number may be anything.
        evaluation.trouble("a call could not be told apart", error)
        return None
    return None if claim is None else (evaluation, call, claim)


def _attend(ours: tuple[HostEvaluation, AttentionCall, Claim], dense: Attention, plain: bool) -> torch.Tensor:
    """The call by PARO. Trouble of PARO's own, and a result of its own that is none, end in `dense`; what the host's
    attention gives or raises is the host's."""
    evaluation, call, claim = ours
    of_host: list[BaseException | None] = []  # of each time it was asked: its error, or None for a result

    def host() -> torch.Tensor:
        with evaluation.without_claims():
            try:
                out = dense()
            except BaseException as error:
                of_host.append(error)
                raise
        of_host.append(None)
        return _with_front(call.from_caller(out), stream.first)

    try:
        stream = evaluation.stream_of(call, claim)
        out = stream.evaluation.attend(
            claim.site,
            _with_front(call.q, stream.first),
            call.k,
            call.v,
            scale=call.scale,
            key_bias=claim.key_bias,
            dense=host,
            # Rows in front are no part of what the host would compute.
            plain=plain and not stream.first,
            blocks=stream.blocks,
        )
        if stream.first:
            out = out[:, :, stream.first :]
        wrong = None if of_host else call.unlike_result(out)
        if wrong is None:
            return call.to_caller(out)
        raise RuntimeError(wrong)
    except Exception as error:
        if any(error is each for each in of_host):
            raise
        evaluation.trouble(claim.site.name, error)
    return dense()


def _with_front(rows: torch.Tensor, first: int) -> torch.Tensor:
    """`[B, H, L, D]` with `first` rows of zeros in front: the runtime knows only calls where every token asks."""
    return F.pad(rows, (0, 0, first, 0)) if first else rows
