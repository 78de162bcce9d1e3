"""What tests of several ranks run: `python tests/ranks.py RANK RANKS FOLDER DEVICE` is one rank, which leaves its
results in the folder; `run_ranks` starts all of them, and `alone` is the same work in one process without a group."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

if "comfyui_paro" not in sys.modules:  # in a rank; in pytest the conftest did it
    _spec = importlib.util.spec_from_file_location(
        "_checkout", Path(__file__).resolve().parent.parent / "scripts" / "_checkout.py"
    )
    _checkout = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_checkout)
    _checkout.register()

from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator
from comfyui_paro.paro_runtime.config.recipes import mask_options, recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.options import query_block
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Plan, Site, SitePlan
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session
from comfyui_paro.paro_runtime.run.ulysses import Ulysses, plan_of_all
from comfyui_paro.tests.sparse_call import sparse_attention
from comfyui_paro.tests.tiny_wan import sampler
from comfyui_paro.tests.tiny_wan.data import context_for
from comfyui_paro.tests.tiny_wan.model import load_tiny_wan

SECONDS = 300  # that a rank may take before it counts as hung
LAYOUT, DIM = TokenLayout(5, (3, 7, 9), 3), 32  # 197 tokens: one part is short
STREAMS = {"whole": (197,), "text apart": (5, 192)}
CALLS = [(name, *rest) for name in STREAMS for rest in ((4, 4, "16bit"), (8, 4, "int8"))]
GRID = (3, 9, 11)  # 297 tokens
SITE, IDENTITY = Site("block", 0), ModelIdentity("wan", "tiny", "tiny")
SETTINGS = {
    budget: Settings(
        preset="custom", density=0.4, dense_steps=3, min_tokens=0, strict=True, budget=budget, precision="16bit"
    )
    for budget in ("shared", "per_head")
}


def call_of(heads: int, kv_heads: int, device: str) -> tuple[tuple[torch.Tensor, ...], Plan]:
    """q, k, v `[1, H, 197, 32]` and a plan of one site in which no two key heads have the same order, mask and bias."""
    generator = torch.Generator().manual_seed(heads)
    qkv = [torch.randn(1, count, LAYOUT.length, DIM, generator=generator) for count in (heads, kv_heads, kv_heads)]
    names = [("FHW", "WHF", "HWF", "4x4x4")[head * kv_heads // heads] for head in range(heads)]
    block_q = query_block(LAYOUT.grid_tokens)
    blocks = [-(-LAYOUT.grid_tokens // size) for size in (block_q, 64)]
    mask = torch.rand(heads, *blocks, generator=generator) < 0.4
    entry = SitePlan.create(names, mask, torch.randn(heads, generator=generator), torch.ones(heads))
    return tuple(x.to(device) for x in qkv), Plan(IDENTITY, LAYOUT, block_q, {SITE: entry}, expansions=4)


def by_plan(plan: Plan, precision: str):
    """Attention of whole sequences by a plan of one site, as one kernel call."""
    entry = plan.sites[SITE]
    sizes = {"block_q": plan.block_q, "pool": plan.pool, "expansions": plan.expansions, "precision": precision}

    def attention(q, k, v):
        rest = {"layout": LAYOUT, "orders": entry.orders, "mask": entry.mask(q.device), **sizes}
        return sparse_attention(q, k, v, tail_bias=entry.tail_bias[0].to(q.device), **rest)

    return attention


def part_of(x: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part of a stream, padded with ones: that nothing of them is used, zeros would not show."""
    part = -(-x.shape[dim] // ranks)
    own = x.narrow(dim, rank * part, min(part, x.shape[dim] - rank * part))
    shape = [part - own.shape[dim] if place == dim % x.dim() else size for place, size in enumerate(x.shape)]
    return torch.cat([own, own.new_ones(shape)], dim)


def joined(parts: list[torch.Tensor], streams: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of what each rank holds `[B, H, local, D]`, and its padding."""
    held = [part.split([-(-length // len(parts)) for length in streams], 2) for part in parts]
    padded = [torch.cat(its, 2) for its in zip(*held, strict=True)]
    ends = [stream[:, :, length:] for stream, length in zip(padded, streams, strict=True)]
    return torch.cat([x[:, :, :length] for x, length in zip(padded, streams, strict=True)], 2), torch.cat(ends, 2)


class SplitBlock(torch.nn.Module):
    """A block of the tiny model that works on this rank's part of the tokens; the first cuts, the last joins them."""

    def __init__(self, block, ulysses: Ulysses, first: bool, last: bool) -> None:
        super().__init__()
        self.block, self.ulysses, self.first, self.last = block, ulysses, first, last

    def forward(self, tokens, e0, text, rope, attention):
        """As `tiny_wan.model.Block`; attention sees whole sequences."""
        u = self.ulysses
        if self.first:
            tokens = part_of(tokens, 1, u.rank, u.ranks)

        def hook(q, k, v, *, layer):
            return u.attend(lambda *qkv: attention(*qkv, layer=layer), q, k, v)

        tokens = self.block(tokens, e0, text, part_of(rope, 0, u.rank, u.ranks), hook)
        if self.last:
            parts = [torch.empty_like(tokens) for _ in range(u.ranks)]
            dist.all_gather(parts, tokens.contiguous())
            tokens = torch.cat(parts, 1)[:, : u.length]
        return tokens


def tiny_run(settings: Settings, plan: Plan | None, device: str, split: bool, calibrator: Calibrator | None = None):
    """Latent of the tiny model on GRID, and the session; split: the sequence over the ranks."""
    model = load_tiny_wan(device=device)
    layout = TokenLayout(0, GRID)
    if split:
        ulysses, last = Ulysses((layout.length,)), len(model.blocks) - 1
        blocks = [SplitBlock(b, ulysses, i == 0, i == last) for i, b in enumerate(model.blocks)]
        model.blocks = torch.nn.ModuleList(blocks)
    session = Session(
        Policy(IDENTITY, recipe_for("wan"), settings, plan),
        sigmas=sampler.sigmas().tolist(),
        highest_noise=1.0,
        calibrator=calibrator,
        calibrate_steps=frozenset({4}),
    )
    evaluation = None

    def on_step(_, sigma):
        nonlocal evaluation
        evaluation = session.begin(layout=layout, sigma=sigma)

    def attention(q, k, v, *, layer):
        def dense():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return evaluation.attend(Site("block", layer), q, k, v, dense=dense)

    context, size = context_for("cross", "left-up", "checker"), (GRID[0], 2 * GRID[1], 2 * GRID[2])
    return sampler.sample(model, context, size, seed=3, attention=attention, on_step=on_step), session


def observed(device: str, split: bool) -> tuple[Calibrator, Settings]:
    """What one dense run shows."""
    settings = SETTINGS["shared"]
    calibrator = Calibrator(IDENTITY, mask_options(settings, recipe_for("wan")))
    tiny_run(settings, None, device, split, calibrator)
    return calibrator, settings


def results(device: str, split: bool) -> dict:
    """All that is compared, by name: calls (in a rank its part of the tokens, with padding), plans and latents."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if split else (0, 1)
    found = {}
    for name, heads, kv_heads, precision in CALLS:
        qkv, plan = call_of(heads, kv_heads, device)
        if split:
            streams = [x.split(STREAMS[name], 2) for x in qkv]
            qkv = [torch.cat([part_of(stream, 2, rank, ranks) for stream in its], 2) for its in streams]
            attention = by_plan(plan.of_rank(rank, ranks), precision)
            found[name, heads] = Ulysses(STREAMS[name]).attend(attention, *qkv)
        else:
            found[name, heads] = by_plan(plan, precision)(*qkv)
    calibrator, settings = observed(device, split)
    plan = plan_of_all(calibrator, {}) if split else calibrator.plan({})
    found["plan"] = {site.name: (e.orders, e.packed, e.tail_bias, e.rotate) for site, e in plan.sites.items()}
    own = plan.of_rank(rank, ranks)
    found["given plan"], session = tiny_run(settings, own, device, split)
    found["sparse"] = session.finish().calls
    found["on the way"], _ = tiny_run(SETTINGS["per_head"], None, device, split)
    return found


def alone(device: str = "cpu") -> dict:
    """`results` of one process."""
    return results(device, split=False)


def run_ranks(ranks: int, folder: Path, device: str = "cpu", script: Path | None = None) -> list[dict]:
    """`results` of so many processes, or those of another script that ends in `be_rank`, by rank. Raises RuntimeError
    with what they printed if one fails or hangs."""
    command = [sys.executable, str(script or Path(__file__).resolve())]
    begun = []
    for rank in range(ranks):
        log = (folder / f"log{rank}").open("w+", encoding="utf-8")
        more = [str(rank), str(ranks), str(folder), device]
        begun.append((subprocess.Popen(command + more, stdout=log, stderr=subprocess.STDOUT), log))
    failed = []
    for rank, (process, log) in enumerate(begun):
        try:
            wrong = process.wait(SECONDS) != 0
        except subprocess.TimeoutExpired:
            process.kill()
            wrong = True
        log.seek(0)
        if wrong:
            failed.append(f"rank {rank} returned {process.poll()}:\n{log.read()}")
        log.close()
    if failed:
        raise RuntimeError("\n".join(failed))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def be_rank(found_by: Callable[[str], dict]) -> None:
    """Be the rank that the command line says: leave what `found_by(device)` gives, on the CPU, in the folder."""
    rank, ranks, folder, device = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    with torch.inference_mode():
        found = found_by(device)
    on_cpu = {name: its.cpu() if isinstance(its, torch.Tensor) else its for name, its in found.items()}
    torch.save(on_cpu, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    be_rank(lambda device: results(device, split=True))
