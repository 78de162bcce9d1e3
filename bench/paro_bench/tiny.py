"""Suite `tiny`: a trained video model, small enough to sample hundreds of times, sparse against dense by seed.

Everything runs through the runtime's own session, calibrator and PyTorch reference at 16-bit precision, so what differs
from the dense run is what the method leaves out. All videos of a variant are sampled at once, each as heads of its own:
every video has its own plan and its own measured bias, as if it were sampled alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ...kernels.core.layout import TokenLayout, geometry_of
from ...paro_runtime.calibration.accumulator import SiteSums
from ...paro_runtime.calibration.calibrator import Calibrator, Method
from ...paro_runtime.config.recipes import mask_options, recipe_for
from ...paro_runtime.config.settings import Settings
from ...paro_runtime.plan.options import MaskOptions, query_block
from ...paro_runtime.plan.plan import IN_PASSING, ModelIdentity, Plan, Site, SitePlan
from ...paro_runtime.run.policy import Policy
from ...paro_runtime.run.session import Session
from ...tests.tiny_wan import data, sampler
from ...tests.tiny_wan.model import TinyWan, load_tiny_wan
from ..metrics import cosine, psnr, ssim
from .baselines import band_mask, radial_mask, random_mask

GRIDS = ((8, 12, 12), (9, 13, 11))
STEPS = 8
SEEDS = tuple(range(1000, 1016))
CALIBRATION_SEEDS = tuple(range(1, 9))
IDENTITY = ModelIdentity("wan", "tiny", "tiny")
LAYERS, HEADS = 4, 2


@dataclass(frozen=True)
class Variant:
    """One way to sample sparsely.

    plan: `offline` (made from other videos), `passing` (from the last dense step of the same video) or a fixed mask's
    name. videos: how many the offline plan is made from. refresh: measure the tail's bias again while sampling.
    schedule: of the density over the sparse steps. backend and precision: of the kernels.
    """

    name: str
    density: float
    dense_steps: int
    tail: bool = True
    order: str = "mass"
    budget: str = "shared"
    pool: int = 64
    plan: str = "offline"
    videos: int = 8
    refresh: bool = True
    schedule: str = "falling"
    method: Method = field(default_factory=Method)
    backend: str = "reference"
    precision: str = "16bit"

    def settings(self) -> Settings:
        return Settings(
            preset="custom",
            density=self.density,
            precision=self.precision,
            dense_steps=self.dense_steps,
            min_tokens=0,
            tail="on" if self.tail else "off",
            order=self.order,
            budget=self.budget,
            backend=self.backend,
            strict=True,
            density_schedule=self.schedule,
        ).validated()

    def options(self) -> MaskOptions:
        return replace(mask_options(self.settings(), recipe_for("wan")), pool=self.pool if self.tail else None)


class TinyBench:
    """The model and the dense runs of one grid. Tensors stay on `device`.

    What depends on the model is in the class's attributes and in `load`, `start` and `decode`, for beds beside this
    one.
    """

    identity, layers, heads, steps, shift = IDENTITY, LAYERS, HEADS, STEPS, 3.0
    decode = staticmethod(data.decode)

    def __init__(self, grid: tuple[int, int, int], device: str = "cpu", seeds=SEEDS) -> None:
        self.grid, self.device, self.seeds = grid, device, tuple(seeds)
        self.layout = TokenLayout(0, grid)
        self.size = (grid[0], 2 * grid[1], 2 * grid[2])
        self.model = self.load()
        self._calibrators: dict[tuple, Calibrator] = {}
        self.dense = self.sample(self.seeds, None) if self.seeds else None
        self.dense_video = self.decode(self.dense) if self.seeds else None

    def load(self) -> TinyWan:
        """The model, on the device."""
        return load_tiny_wan(device=self.device)

    def start(self, seeds) -> tuple[torch.Tensor, torch.Tensor]:
        """Text `[B, 3, 4096]` and noise of the clips with these seeds: each depends on its own seed only."""
        labels = [torch.randint(0, 4, (1, 3), generator=torch.Generator().manual_seed(s)) for s in seeds]
        noise = [sampler.seeded_noise((1, 16, *self.size), s) for s in seeds]
        return data.contexts(torch.cat(labels)), torch.cat(noise)

    def sample(self, seeds, session: Session | None, apart: bool = False) -> torch.Tensor:
        """Latents of the clips, every self-attention through the session (None: dense); with `apart` the heads of each
        clip are heads of their own there."""
        context, noise = self.start(seeds)
        evaluation = [None]

        def attention(q, k, v, *, layer):
            if session is None:
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)
            shape = q.shape
            if apart:
                q, k, v = (x.reshape(1, -1, *shape[2:]) for x in (q, k, v))

            def dense():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

            return evaluation[0].attend(Site("block", layer), q, k, v, dense=dense, blocks=self.layers).reshape(shape)

        def on_step(_, sigma):
            if session is not None:
                evaluation[0] = session.begin(layout=self.layout, sigma=sigma)

        return self._sample(context, noise, attention, on_step)

    def _sample(self, context, noise, attention, on_step=None) -> torch.Tensor:
        common = {"steps": self.steps, "shift": self.shift, "noise": noise}
        return sampler.sample(self.model, context, self.size, attention=attention, on_step=on_step, **common)

    def session(self, variant: Variant, **more) -> Session:
        policy = Policy(self.identity, recipe_for("wan"), variant.settings(), more.pop("plan", None), None)
        more |= {"refresh": variant.refresh, "method": variant.method}
        return Session(policy, sigmas=sampler.sigmas(self.steps, self.shift).tolist(), highest_noise=1.0, **more)

    def offline_plan(self, variant: Variant) -> Plan:
        """From all steps of other videos. Sums taken at density 0.1 serve every density, budget and criterion."""
        method, options = variant.method, variant.options()
        key = (options.order, options.pool, variant.videos, replace(method, criterion="mass"))
        if key not in self._calibrators:
            by_error = replace(method, criterion="error")
            calibrator = Calibrator(self.identity, replace(options, density=0.1), method=by_error)
            # One after the other, as PARO Calibrate runs its prompts: orders are compared under each one's attention.
            for calibrator.prompt, seed in enumerate(CALIBRATION_SEEDS[: variant.videos]):
                self.sample([seed], self.session(variant, calibrator=calibrator))
            self._calibrators[key] = calibrator
        calibrator = self._calibrators[key]
        calibrator.options, calibrator.method = options, method
        return calibrator.plan({"by": "bench"})

    def passing_plans(self, variant: Variant) -> list[Plan]:
        """Of each video from its own last dense step, as a run makes it in passing."""
        method, options, step = variant.method, variant.options(), max(0, variant.dense_steps - 1)
        key = (options.order, options.pool, options.density, step, replace(method, criterion="mass"))
        if key not in self._calibrators:
            calibrator = Calibrator(self.identity, options, method=replace(method, criterion="error"))
            session = self.session(variant, calibrator=calibrator, calibrate_steps=frozenset({step}))
            self.sample(self.seeds, session, apart=True)
            self._calibrators[key] = calibrator
        found, method = [], method.in_passing(noisy=step == 0)
        for video in range(len(self.seeds)):
            heads = slice(video * self.heads, (video + 1) * self.heads)
            one = Calibrator(self.identity, options, method=method)
            one.layout = self.layout
            # Heads are observed apart from each other; only the budget is shared, and that among those of one video.
            one._sums = {site: _of_heads(sums, heads) for site, sums in self._calibrators[key]._sums.items()}
            found.append(one.plan({"by": IN_PASSING, "step": step}))
        return found

    def watch(self, seeds, see: Callable, steps) -> None:
        """Sample densely and show `see(site, q, k, v)` the calls of some steps."""
        context, noise = self.start(seeds)
        now = [0]

        def attention(q, k, v, *, layer):
            if now[0] in steps:
                see(Site("block", layer), q, k, v)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        def on_step(step, _):
            now[0] = step

        self._sample(context, noise, attention, on_step)

    def fixed_plan(self, kind: str, density: float) -> Plan:
        """The same published rule for every head; `window` takes the better of two bands for each."""
        rows = query_block(self.layout.grid_tokens)
        geometry = geometry_of(self.layout, rows)
        orders = dict.fromkeys(self._sites(), ("FHW",) * self.heads)
        if kind == "window":
            mask = band_mask(geometry, density)
            orders = self._better_band(mask)
        else:
            mask = radial_mask(geometry, density) if kind == "radial" else random_mask(geometry, density, 0)
        mask = mask.expand(self.heads, -1, -1)
        sites = {s: SitePlan.create(names, mask, None, torch.ones(self.heads)) for s, names in orders.items()}
        return Plan(self.identity, self.layout, rows, sites)

    def _sites(self) -> tuple[Site, ...]:
        return tuple(Site("block", layer) for layer in range(self.layers))

    def _better_band(self, mask: torch.Tensor) -> dict[Site, tuple[str, ...]]:
        from ...kernels.core.inputs import ScoreInputs
        from ...kernels.statistics.api import block_statistics, row_logsumexp
        from ...paro_runtime.plan.orders import order_table

        kept = {s: dict.fromkeys(("FHW", "HWF"), 0.0) for s in self._sites()}
        context, noise = self.start(CALIBRATION_SEEDS[:1])
        geometry = geometry_of(self.layout, query_block(self.layout.grid_tokens))
        mask = mask.to(self.device)

        def attention(q, k, v, *, layer):
            scores = ScoreInputs(q, k)
            lse = row_logsumexp(scores)
            for name in ("FHW", "HWF"):
                rows = order_table(name, self.grid).to(q.device).expand(self.heads, -1)
                mass = block_statistics(scores, lse, geometry, rows).mass
                kept[Site("block", layer)][name] += (mass * mask).sum((1, 2))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        self._sample(context, noise, attention)
        return {
            s: tuple(
                "HWF" if b > a else "FHW" for a, b in zip(found["FHW"].tolist(), found["HWF"].tolist(), strict=True)
            )
            for s, found in kept.items()
        }

    def run(self, variant: Variant) -> dict:
        """Sample every seed sparsely and compare with its dense run."""
        began = time.perf_counter()
        if variant.plan == "passing":
            plans = self.passing_plans(variant)
        else:
            offline = variant.plan == "offline"
            plan = self.offline_plan(variant) if offline else self.fixed_plan(variant.plan, variant.density)
            plans = [plan] * len(self.seeds)
        plan = _side_by_side(plans)
        session = self.session(variant, plan=plan)
        latents = self.sample(self.seeds, session, apart=True)
        groups = [session.schedule.group(step, plan.groups) for step in range(variant.dense_steps, self.steps)]
        record = self.compare(latents)
        record |= {"name": variant.name, "grid": "x".join(map(str, self.grid)), "density": variant.density}
        record |= {"dense_steps": variant.dense_steps, "tail": variant.tail, "plan": variant.plan}
        record |= {"schedule": variant.schedule, "densities": [round(density, 4) for density in plan.densities]}
        # Over the steps there were; a plan of three groups counts each alike.
        record |= {"kept_density": sum(plan.densities[group] for group in groups) / len(groups)}
        record |= {"mass_kept": plan.mass_kept if variant.plan in ("offline", "passing") else None}
        return record | {"seconds": round(time.perf_counter() - began, 2)}

    def compare(self, latents: torch.Tensor) -> dict:
        """PSNR of each video and its mean and worst, SSIM, cosine of the latents."""
        video = self.decode(latents)
        values = [psnr(a, b) for a, b in zip(video, self.dense_video, strict=True)]
        likeness = [ssim(a, b) for a, b in zip(video, self.dense_video, strict=True)]
        cosines = [cosine(a, b) for a, b in zip(latents, self.dense, strict=True)]
        mean = sum(values) / len(values)
        return {
            "psnr": round(mean, 3),
            "psnr_worst": round(min(values), 3),
            "ssim": round(sum(likeness) / len(likeness), 4),
            "latent_cosine": round(sum(cosines) / len(cosines), 5),
            "psnr_each": [round(v, 2) for v in values],
        }


def _of_heads(sums: SiteSums, heads: slice) -> SiteSums:
    return replace(sums, **{name: tensor[heads] for name, tensor in sums.tensors().items()})


def _side_by_side(plans: list[Plan]) -> Plan:
    """One plan with the heads of all: those of the first plan first."""
    sites = {}
    for site in plans[0].sites:
        entries = [plan.sites[site] for plan in plans]
        orders = [name for entry in entries for name in entry.orders]
        if not entries[0].has_masks:
            columns = {
                name: [getattr(entry, name) for entry in entries] for name in ("tail_bias", "density", "mass_kept")
            }
            joined = {name: None if parts[0] is None else torch.cat(parts, 1) for name, parts in columns.items()}
            shape = (len(orders), *entries[0].shape[1:])
            sites[site] = replace(entries[0], orders=tuple(orders), shape=shape, rotate=False, **joined)
            continue
        groups = []
        for group in range(plans[0].groups):
            mask = torch.cat([entry.mask(group=group) for entry in entries])
            bias = None if entries[0].tail_bias is None else torch.cat([entry.tail_bias[group] for entry in entries])
            groups.append(SitePlan.create(orders, mask, bias, torch.cat([entry.mass_kept[group] for entry in entries])))
        sites[site] = SitePlan.joined(groups)
    return replace(plans[0], sites=sites)


def run_variants(bench: TinyBench, variants: list[Variant], told: Callable[[str], None]) -> list[dict]:
    """Records of every variant."""
    records = []
    for variant in variants:
        record = bench.run(variant)
        records.append(record)
        told(
            f"{record['grid']} {variant.name} d {variant.density} dense {variant.dense_steps}: {record['psnr']:.2f} dB"
        )
    return records
