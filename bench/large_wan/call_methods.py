"""Ways to compute one attention call, each with its error and its time: PARO under different orders and masks, routing
by block means, and the host's block-sparse kernel."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from ...kernels.attention.api import sparse_attention
from ...kernels.core.block_mask import pack_bits
from ...kernels.core.inputs import AttentionInputs, ScoreInputs
from ...kernels.core.layout import TokenLayout
from ...kernels.core.pattern import SparsePattern
from ...kernels.core.precision import PRECISIONS
from ...paro_runtime.attention.patterns import build_pattern, pattern_of, with_bias
from ...paro_runtime.calibration.calibrator import Calibrator, Method
from ...paro_runtime.calibration.tail_fit import best_bias, measured_rows, observe_bias
from ...paro_runtime.compiling.self_check import site_precision
from ...paro_runtime.plan.options import MaskOptions, query_block
from ...paro_runtime.plan.orders import ORIGINAL
from ...paro_runtime.plan.plan import ModelIdentity, Plan, Site, SitePlan
from ...paro_runtime.run.masks import routed_bits
from .routing import Worth, mask_by_worth, pooled_scores, without_masks
from .timed import Stopwatch

ORDERS = {"all orders": ("mass", True), "axis orders": ("mass", False), "model's own order": ("original", True)}
BLOCK = 64
TAU = 1.0


@dataclass(frozen=True)
class Call:
    """One attention call: q, k and v `[1, H, L, D]`; what: layer and step or picture, or that it is planted."""

    what: str
    site: Site
    layout: TokenLayout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class How:
    """How calls are computed and timed. repeats: timed runs of each, of which the median counts; 0 times nothing, and
    rows have no times."""

    device: str
    backend: str
    precision: str
    repeats: int = 20


def exact_attention(call: Call) -> torch.Tensor:
    """Dense attention in float32, head by head, `[1, H, L, D]`."""
    parts = []
    for head in range(call.q.shape[1]):
        q, k, v = (x[:, head : head + 1].float() for x in (call.q, call.k, call.v))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v))
    return torch.cat(parts, 1)


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2 error over all heads together."""
    return ((out.float() - exact).norm() / exact.norm()).item()


def timed(name: str, run: Callable[[], object], how: How) -> dict[str, float]:
    """Median milliseconds of a run after one that warms up, under that name; nothing where nothing is timed."""
    if not how.repeats:
        return {}
    run()
    times = []
    for _ in range(how.repeats):
        watch = Stopwatch(how.device)
        with watch.measure("run", 0):
            run()
        times.append(1000 * watch.seconds()["run", 0])
    return {name: statistics.median(times)}


class Plans:
    """PARO's plans of the calls it is shown, by kind of order and density; all sites of a plan share its budget.

    kinds: of ORDERS. masks: as `Method.masks`.
    """

    def __init__(
        self, densities: list[float], how: How, kinds: Iterable[str] = tuple(ORDERS), masks: str = "auto"
    ) -> None:
        self._how = how
        self._calibrators = {
            (name, density): Calibrator(
                ModelIdentity("wan", "bench", "bench"),
                MaskOptions(density, order, "shared", BLOCK),
                method=Method(tiles=tiles, masks=masks),
            )
            for name, (order, tiles) in ((name, ORDERS[name]) for name in kinds)
            for density in densities
        }

    def observe(self, call: Call) -> None:
        """Take a call into every plan."""
        for calibrator in self._calibrators.values():
            calibrator.observe(call.site, call.layout, call.q, call.k, call.v, backend=self._how.backend)

    def made(self) -> dict[tuple[str, float], Plan]:
        """The plans of what was observed."""
        return {key: calibrator.plan({"by": "bench"}) for key, calibrator in self._calibrators.items()}


def paro_rows(
    call: Call,
    exact: torch.Tensor,
    plans: dict[tuple[str, float], Plan],
    how: How,
    worth: Worth | None = None,
    masks: str = "",
) -> Iterator[dict]:
    """PARO under each plan. ms: of the kernel with its pre-pass. measuring_ms: of what the first step of a group of
    steps measures for the others, mask and bias, not in ms. worth: what the call's blocks are worth, for masks in
    place of the product's. masks: what the masks are, for the name of the method."""
    masks = masks and f", {masks}"
    for (name, density), plan in plans.items():
        entry = plan.sites[call.site]

        def measured(entry=entry, plan=plan) -> SparsePattern:
            pattern = _measured_mask(call, entry, plan, how, worth)
            return with_bias(pattern, _measured_bias(call, pattern, how))

        pattern = measured()
        precision, _ = site_precision(how.precision, entry.rotate, call.q, how.backend, plan.block_q, plan.pool)

        def attend(pattern=pattern, precision=precision) -> torch.Tensor:
            return sparse_attention(call.q, call.k, call.v, pattern, precision, backend=how.backend)

        row = {"method": f"PARO, {name}{masks}", "density": density}
        row |= {"kept_density": round(pattern.mask.float().mean().item(), 4)}
        yield row | judged(attend(), exact, attend, how) | timed("measuring_ms", measured, how)


def _measured_mask(call: Call, entry: SitePlan, plan: Plan, how: How, worth: Worth | None) -> SparsePattern:
    """The call's pattern, with a mask by worth, or else its own where the plan has none, as in a run."""

    def measure(bare: SparsePattern) -> torch.Tensor:
        if worth is None:
            return routed_bits(entry, 0, ScoreInputs(call.q, call.k), bare, how.backend)
        found = worth(call.q, call.k, call.v, bare.geometry, bare.tables_of_heads(call.q.shape[1]))
        return pack_bits(mask_by_worth(found, entry, 0))

    if worth is not None:
        entry = without_masks(entry)

    sizes = {"block_q": plan.block_q, "pool": plan.pool, "expansions": plan.expansions}
    where = {"kv_heads": call.k.shape[1], "device": call.q.device}
    return pattern_of(entry, call.layout, group=0, measure=measure, **sizes, **where)


def judged(out: torch.Tensor, exact: torch.Tensor, run: Callable[[], object], how: How) -> dict:
    """Error of a result, and time of what made it, JSON-ready."""
    return {"error": relative_error(out, exact)} | timed("ms", run, how)


def _measured_bias(call: Call, pattern: SparsePattern, how: How) -> torch.Tensor:
    tables = pattern.tables_of_heads(call.q.shape[1])
    sizes = {"pool": pattern.pool, "expansions": pattern.expansions, "backend": how.backend}
    sizes["rows"] = measured_rows(pattern.geometry.grid_tokens)
    inputs = AttentionInputs(call.q, call.k, call.v, pattern.geometry, tables)
    return best_bias(observe_bias(inputs, pattern.mask, **sizes).errors)


def routed_row(call: Call, exact: torch.Tensor, density: float, how: How) -> dict:
    """Blocks of 64 keys by the means of 64 queries and keys in the model's own order, the best of each row, nothing for
    what is dropped: on PARO's kernel, whose query blocks may be 128 rows, what the host's routing is without its tail
    (`pooled.py` has both). routing_ms: of choosing them, in plain PyTorch, not in ms."""
    heads, block_q = call.q.shape[1], query_block(call.layout.grid_tokens)
    empty = build_pattern(
        call.layout, (ORIGINAL,) * heads, None, None, block_q=block_q, kv_heads=heads, device=call.q.device
    )
    grid = replace(empty.geometry, prefix=0, suffix=0)
    inside = slice(empty.geometry.prefix, empty.geometry.prefix + grid.grid_tokens)

    def choose() -> torch.Tensor:
        q, k, v = (x[:, :, inside] for x in (call.q, call.k, call.v))
        worth = pooled_scores(BLOCK)(q, k, v, grid, empty.tables_of_heads(heads))
        best = worth.topk(max(1, round(density * grid.k_blocks)), 2).indices
        return torch.zeros_like(worth, dtype=torch.bool).scatter_(2, best, True)

    mask = choose()
    pattern = SparsePattern.from_mask(empty.geometry, empty.tables, empty.order_of_head, mask)

    def attend() -> torch.Tensor:
        return sparse_attention(call.q, call.k, call.v, pattern, PRECISIONS[how.precision], backend=how.backend)

    row = {"method": "block means, top-k, on PARO's kernel", "density": density}
    row |= {"kept_density": round(mask.float().mean().item(), 4)} | timed("routing_ms", choose, how)
    return row | judged(attend(), exact, attend, how)


def why_no_sol_attn(device: str) -> str | None:
    """Why the host's block-sparse attention cannot be run here, or None."""
    try:
        import comfy_kitchen
    except ImportError as error:
        return f"comfy_kitchen cannot be imported ({error})"
    if not hasattr(comfy_kitchen, "sol_attn"):
        return f"comfy_kitchen {getattr(comfy_kitchen, '__version__', 'of this host')} has no sol_attn (0.2.40 has)"
    return None if device.startswith("cuda") else "sol_attn runs on CUDA only"


def sol_rows(call: Call, exact: torch.Tensor, densities: list[float], how: How) -> Iterator[dict]:
    """The host's kernel itself: its top-k at each density, and its own threshold, whose density it does not tell."""
    import comfy_kitchen

    rows = [x.transpose(1, 2).contiguous() for x in (call.q, call.k, call.v)]
    kinds = [(f"sol_attn, tau {TAU}", None, {"tau": TAU})]
    kinds += [("sol_attn, top-k", density, {"topk_ratio": density}) for density in densities]
    for method, density, chosen in kinds:

        def attend(chosen=chosen) -> torch.Tensor:
            return comfy_kitchen.sol_attn(*rows, **chosen).transpose(1, 2)

        yield {"method": method, "density": density} | judged(attend(), exact, attend, how)
