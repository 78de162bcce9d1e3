"""The kernels against the reference on a small call, before a run relies on them: a wrong kernel on unknown hardware
must cost nobody a generation.

What is checked is what sparse steps run: lists of kept blocks, the tail with expanded pools, context tokens on both
sides, a ragged last block, orders of two heads; and the dense form. With the data below a mask that is ignored or
shifted, a tail that is left out or of plain means, or heads whose orders are mixed up are wrong by 0.44 and more.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from ...kernels.attention.api import sparse_attention as run_kernel
from ...kernels.attention.gluon_sm90 import launch as gluon_launch
from ...kernels.attention.launch_plan import KERNELS
from ...kernels.core.dispatch import served
from ...kernels.core.layout import TokenLayout
from ...kernels.core.pattern import MOST_EXPANSIONS, SparsePattern
from ...kernels.core.precision import PRECISIONS, Precision
from ...kernels.core.support import Request, form_of, target_of
from ..attention.patterns import build_pattern

log = logging.getLogger("paro")

LAYOUT = TokenLayout(5, (3, 11, 17), 3)
ORDERS = ("HWF", "WFH")
DENSITY = 0.4
# Logits of unit normal queries and keys are made smaller, so that attention is spread over many blocks.
QUERY_SCALE = 0.7

_checked: dict[tuple, str | None] = {}
_lock = threading.Lock()


def self_check(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    precision: str | Precision,
    backend: str,
    *,
    block_q: int = 64,
    pool: int | None = 64,
    special: bool = False,
) -> str | None:
    """Why the kernels must not be used here, or None. Wrong numbers are remembered for the process; what may pass, such
    as too little memory, is not.

    block_q, pool: of the run's masks and tail (None without one). special: check the kernel for this one GPU
    generation (`gluon_sm90.launch`), which is left out otherwise; None where it serves no such call.
    """
    chosen = PRECISIONS[precision] if isinstance(precision, str) else precision
    key = (device, dtype, head_dim, chosen, backend, block_q, pool, special)
    with _lock:
        if key not in _checked:
            try:
                found = _check(*key)
            except Exception as error:  # new hardware, a new compiler, or no memory: a reason, and another try later
                said = next(iter(str(error).splitlines()), "")[:200]
                return f"self-check: the kernels cannot run ({type(error).__name__}: {said})"
            _checked[key] = found
            if found:
                log.warning("PARO is off on %s in %s: %s", device, precision, found)
        return _checked[key]


def _check(device, dtype, head_dim, precision: Precision, backend, block_q, pool, special) -> str | None:
    bound = precision.error_bound
    errors = errors_of(device, dtype, head_dim, precision, backend, block_q=block_q, pool=pool, special=special)
    wrong = [error for error in errors if not error <= bound]  # NaN is wrong too
    if wrong:
        return f"self-check: relative error {wrong[0]:.3g} against the reference, at most {bound} is allowed"
    return None


def errors_of(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    precision: Precision,
    backend: str,
    *,
    block_q: int,
    pool: int | None,
    special: bool = False,
) -> list[float]:
    """Relative L2 errors of a call with a mask and of one without; arguments as `self_check`."""
    known = problem(dtype, head_dim, block_q, pool)
    q, k, v = (x.to(device) for x in (known.q, known.k, known.v))
    errors = []
    for masked, exact in zip((True, False), known.exact, strict=True):
        pattern = _pattern(known, masked, block_q, pool, device)
        with gluon_launch.set_aside(not special):
            form = form_of(masked, masked and pool is not None)
            request = Request(target_of(device), dtype, head_dim, precision, form, block_q, pattern.pool)
            if special and served(request, KERNELS).by != gluon_launch.KERNEL.name:
                continue
            flag = torch.zeros(4, dtype=torch.int32, device=device)
            out = run_kernel(q, k, v, pattern, precision, nonfinite=flag, backend=backend).cpu().float()
        errors.append(((out - exact).norm() / exact.norm()).item())
    return errors


@dataclass(frozen=True)
class Problem:
    """A call and its results on the CPU: q, k, v `[1, 2, L, D]`, mask bool `[2, q_blocks, k_blocks]`; exact: float32
    results with the mask and without one."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    exact: tuple[torch.Tensor, ...] = ()


@lru_cache(maxsize=4)
def problem(dtype: torch.dtype, head_dim: int, block_q: int, pool: int | None) -> Problem:
    """The call to check with. On the CPU: its values must not depend on a device's generator, nor its results on the
    device that is checked; and it can be had ahead of the run (`ahead.load_early`)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (draw(1, len(ORDERS), LAYOUT.length, head_dim) for _ in range(3))
    # Queries with a mean: pools around it differ from plain ones.
    q = (q + draw(1, len(ORDERS), 1, head_dim)) * QUERY_SCALE
    blocks = (-(-LAYOUT.grid_tokens // block_q), -(-LAYOUT.grid_tokens // 64))
    mask = torch.rand(len(ORDERS), *blocks, generator=generator) < DENSITY
    q, k, v = (x.to(dtype) for x in (q, k, v))
    asked = Problem(q, k, v, mask)
    run = partial(run_kernel, q.float(), k.float(), v.float(), precision=PRECISIONS["16bit"], backend="reference")
    patterns = [_pattern(asked, masked, block_q, pool, torch.device("cpu")) for masked in (True, False)]
    return replace(asked, exact=tuple(run(pattern=pattern) for pattern in patterns))


def _pattern(known: Problem, masked: bool, block_q: int, pool: int | None, device: torch.device) -> SparsePattern:
    sizes = {"block_q": block_q, "pool": pool or 64, "expansions": 0 if pool is None else MOST_EXPANSIONS}
    bias = torch.tensor([0.5, -0.5]) if masked and pool is not None else None
    return build_pattern(LAYOUT, ORDERS, known.mask if masked else None, bias, device=device, **sizes)


def site_precision(
    name: str, rotate: bool, q: torch.Tensor, backend: str, block_q: int, pool: int | None
) -> tuple[Precision, str | None]:
    """Precision of a site: INT8 is rotated where the plan says so and the rotated kernel passes its self-check; and why
    it is not, where the plan says so, or None."""
    plain = PRECISIONS[name]
    rotated = plain.rotated if rotate else None
    if rotated is None:
        return plain, None
    reason = self_check(q.device, q.dtype, q.shape[3], rotated, backend, block_q=block_q, pool=pool)
    return (rotated, None) if reason is None else (plain, reason)
