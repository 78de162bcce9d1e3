"""What a row of `mechanisms` changes in a run: one mechanism of the method, or where its masks come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ...kernels.core.precision import PRECISIONS
from ...paro_runtime.calibration.calibrator import Method
from ...paro_runtime.config.settings import Settings
from ...paro_runtime.plan.plan import Plan, SitePlan
from ...paro_runtime.run.session import Session
from ...paro_runtime.run.tail_bias import TailBiasUpdate
from ..paro_bench.tiny import TinyBench, Variant, _side_by_side
from . import routing
from .routing import Router

# Of the runs whose plans are used as found ones: neither those that are measured nor those of PARO Calibrate.
OTHER_SEEDS = 5000
MECHANISM, POLICY = "mechanism", "policy"


class HostDense(Variant):
    """A variant whose dense steps run on what the bench gives for them, whatever is faster here."""

    def settings(self) -> Settings:
        """See `Variant.settings`."""
        return replace(super().settings(), dense_attention="host")


def _own(bench: TinyBench, variant: Variant) -> None:
    """No plan is given: the run makes one."""


def _nothing(session: Session) -> None:
    """The session is as the product has it."""


@dataclass(frozen=True)
class Row:
    """The default with one thing changed.

    changes: fields of `Variant`. source: the plan that is given, None: the run makes its own of its last dense step.
    prepare: changes a session before its run. edit: changes the run's own plan, once it is made. router: makes other
    masks, for one run. free: what it takes to choose those is not the run's time.
    """

    name: str
    changes: dict = field(default_factory=dict)
    kind: str = MECHANISM
    source: Callable[[TinyBench, Variant], Plan | None] = _own
    prepare: Callable[[Session], None] = _nothing
    edit: Callable[[Plan], Plan] | None = None
    router: Callable[[], Router] | None = None
    free: bool = False

    def variant(self, density: float, dense_steps: int, backend: str, precision: str) -> Variant:
        """The bench's variant of this row at a density."""
        common = {"backend": backend, "precision": precision, "plan": "passing"}
        return HostDense(self.name, density, dense_steps, **(common | self.changes))


class _Kept(TailBiasUpdate):
    """The plan's bias stays."""

    def due(self, key, step, group, once) -> bool:
        return False


class _EveryGroup(TailBiasUpdate):
    """Short calls, too, are measured in the first step of each group."""

    def due(self, key, step, group, once) -> bool:
        return super().due(key, step, group, False)


def refreshing(kind: type[TailBiasUpdate]) -> Callable[[Session], None]:
    """Has the tail's bias measured by another object."""

    def prepare(session: Session) -> None:
        session.refresh = kind()

    return prepare


def scheduled(name: str) -> Callable[[Session], None]:
    """Has densities over the sparse steps that no setting chooses with this many dense steps."""

    def prepare(session: Session) -> None:
        session.options = replace(session.options, density_schedule=name)

    return prepare


def never_rotated(plan: Plan) -> Plan:
    """The plan with no site rotated before INT8."""
    return replace(plan, sites={site: replace(entry, rotate=False) for site, entry in plan.sites.items()})


def found_plan(bench: TinyBench, variant: Variant) -> Plan:
    """What a run of as many other clips made on the way."""
    session = bench.session(variant, plan=None)
    bench.sample(tuple(range(OTHER_SEEDS, OTHER_SEEDS + len(bench.seeds))), session, apart=True)
    return session.finish().plan


def calibrated_plan(bench: TinyBench, variant: Variant) -> Plan:
    """What PARO Calibrate makes of other clips, each clip alike."""
    return _side_by_side([bench.offline_plan(variant)] * len(bench.seeds))


def fixed(kind: str) -> Callable[[TinyBench, Variant], Plan]:
    """A published rule for every head, see `TinyBench.fixed_plan`; with the tail where the variant has one, its bias
    left to what the run measures."""

    def source(bench: TinyBench, variant: Variant) -> Plan:
        plan = bench.fixed_plan(kind, variant.density)
        if variant.tail:
            sites = {site: _with_tail(entry) for site, entry in plan.sites.items()}
            plan = replace(plan, sites=sites, expansions=variant.method.expansions)
        return _side_by_side([plan] * len(bench.seeds))

    return source


def _with_tail(entry: SitePlan) -> SitePlan:
    return replace(entry, tail_bias=torch.zeros_like(entry.density))


def mechanism_rows(dense_steps: int, backend: str, precision: str) -> list[Row]:
    """The default and each of its mechanisms changed, as far as that makes a difference in such runs."""
    made = [
        Row("default"),
        Row("model's own order only", {"order": "original"}),
        Row("axis orders only", {"method": Method(tiles=False)}),
        Row("masks of the plan, by mass", {"method": Method(criterion="mass")}),
        Row("masks of the plan, by error", {"method": Method(criterion="error")}),
        Row("budget per head", {"budget": "per_head"}),
        Row("tail off", {"tail": False}),
        *(Row(f"expansions {n}", {"method": Method(expansions=n)}) for n in (0, 1, 4)),
        Row("bias of the plan", {"refresh": False}),
        Row("bias of pools alone", prepare=refreshing(_Kept)),
        Row("bias in every group", prepare=refreshing(_EveryGroup)),
        Row("constant density", {"schedule": "constant"}),
    ]
    if dense_steps:
        made.append(Row("steep schedule", prepare=scheduled("steep")))
    else:
        made.append(Row("falling schedule", prepare=scheduled("falling")))
    if PRECISIONS[precision].rotated is not None and backend == "triton":
        made.append(Row("rotation off", edit=never_rotated))
    if backend == "triton" and precision != "int8":
        made.append(Row("INT8", {"precision": "int8"}))
        made.append(Row("INT8, rotation off", {"precision": "int8"}, edit=never_rotated))
    if precision != "16bit":
        made.append(Row("16 bits", {"precision": "16bit"}))
    return made


def policy_rows() -> list[Row]:
    """Where masks may come from instead of the run's own plan."""
    routed = {"kind": POLICY}

    def router(worth: routing.Worth, once: bool = False) -> Callable[[], Router]:
        return lambda: Router(worth, once)

    made = [
        Row("plan found, of other clips", kind=POLICY, source=found_plan),
        Row("plan of PARO Calibrate", {"plan": "offline"}, POLICY, calibrated_plan),
    ]
    for size in (16, 64):
        name, worth = f"routed by means of {size}", routing.pooled_scores(size)
        made.append(Row(f"{name}, every step", **routed, router=router(worth)))
        made.append(Row(f"{name}, each group", **routed, router=router(worth, True)))
    for parts in (4, 8, 16):
        name, worth = f"routed by {parts} mean queries", routing.mean_queries(parts)
        made.append(Row(f"{name}, every step", **routed, router=router(worth)))
        made.append(Row(f"{name}, each group", **routed, router=router(worth, True)))
    made.append(Row("oracle by mass", **routed, router=router(routing.true_mass), free=True))
    made.append(Row("oracle by error", **routed, router=router(routing.true_error), free=True))
    for kind in ("window", "radial", "random"):
        constant = {"schedule": "constant"}
        made.append(Row(f"{kind}, drop", constant | {"tail": False, "refresh": False}, POLICY, fixed(kind)))
        made.append(Row(f"{kind}, tail", constant, POLICY, fixed(kind)))
    return made
