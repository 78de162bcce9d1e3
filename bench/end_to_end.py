"""One denoising step of Wan 2.1 at real sizes with random weights: the dense backend against PARO.

python bench/end_to_end.py [--models 1.3b,14b] [--grids 480p,720p] [--densities 0.3,0.2,0.1] [--precision auto]
                           [--json FILE]

The architecture is that of tests/tiny_wan at the widths and depths of Wan, so the linear layers, norms and attention
shapes are the real ones. Random weights say nothing about quality: masks are bands of the given density in random
orders, the tail is on, and the plan is given. Attention is timed inside the step with device events.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import _checkout

_checkout.register()

import torch  # noqa: E402
from comfyui_paro.paro_runtime.orders import AXIS_ORDERS  # noqa: E402
from comfyui_paro.paro_runtime.plan import ModelIdentity, Plan, Site, SitePlan  # noqa: E402
from comfyui_paro.paro_runtime.recipes import query_block, recipe_for  # noqa: E402
from comfyui_paro.paro_runtime.session import Policy, Session  # noqa: E402
from comfyui_paro.paro_runtime.settings import Settings  # noqa: E402
from comfyui_paro.paro_runtime.tokens import TokenLayout  # noqa: E402
from comfyui_paro.tests.tiny_wan.model import TinyWan, TinyWanConfig  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

MODELS = {
    "1.3b": TinyWanConfig(dim=1536, layers=30, ffn_dim=8960),
    "14b": TinyWanConfig(dim=5120, layers=40, ffn_dim=13824),
}
GRIDS = {"480p": (21, 30, 52), "720p": (21, 45, 80)}
IDENTITY = ModelIdentity("wan", "random", "random")
# The order in which the host asks torch for a dense backend on NVIDIA.
DENSE_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def random_model(config: TinyWanConfig) -> TinyWan:
    """A model of N(0, 0.02) weights in bf16 on the GPU; norms of one."""
    with torch.device("meta"):
        model = TinyWan(config)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1)
        else:
            parameter.normal_(0, 0.02)
    return model


def banded_plan(layout: TokenLayout, heads: int, layers: int, density: float) -> Plan:
    """A plan of random orders whose masks are bands of uneven width around the diagonal, `density` on average."""
    block_q = query_block(layout.grid_tokens)
    rows, columns = -(-layout.grid_tokens // block_q), -(-layout.grid_tokens // 64)
    generator = torch.Generator().manual_seed(0)
    widths = torch.rand(heads, generator=generator) + 0.5
    widths = widths / widths.mean() * density * columns
    distance = (torch.arange(columns)[None] - torch.arange(rows)[:, None] * columns / rows).abs()
    distance = torch.minimum(distance, columns - distance)  # a band that wraps keeps every row equally long
    mask = distance[None] <= widths[:, None, None] / 2
    orders = [AXIS_ORDERS[i] for i in torch.randint(6, (heads,), generator=generator).tolist()]
    entry = SitePlan.create(orders, mask, torch.zeros(heads), torch.ones(heads))
    return Plan(IDENTITY, layout, block_q, {Site("double", i): entry for i in range(layers)})


class AttentionTimer:
    """Wraps an attention callable and adds up the device time spent in it."""

    def __init__(self, attention) -> None:
        self.attention = attention
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, q, k, v, *, layer):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out = self.attention(q, k, v, layer=layer)
        end.record()
        self.events.append((begin, end))
        return out

    def milliseconds(self) -> float:
        """Sum over the calls since the last `milliseconds`; waits for the device."""
        torch.cuda.synchronize()
        total = sum(begin.elapsed_time(end) for begin, end in self.events)
        self.events.clear()
        return total


def dense_attention(q, k, v, *, layer):
    """The host's dense attention."""
    with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def time_step(model: TinyWan, grid: tuple[int, int, int], attention, repeats: int = 2) -> dict:
    """Milliseconds of one evaluation (best of `repeats` after one warm-up) and of its self-attention; peak GB."""
    timer = AttentionTimer(attention)
    x = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2], device="cuda", dtype=torch.bfloat16)
    context = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)
    t = torch.full((1,), 500.0, device="cuda")
    best = None
    torch.cuda.reset_peak_memory_stats()
    for repeat in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out = model(x, t, context, timer)
        end.record()
        inside = timer.milliseconds()
        if not torch.isfinite(out).all():
            raise SystemExit("the step's result is not finite")
        whole = begin.elapsed_time(end)
        if repeat and (best is None or whole < best["step_ms"]):
            best = {"step_ms": whole, "attention_ms": inside, "rest_ms": whole - inside}
    return {**best, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def paro_attention(layout: TokenLayout, plan: Plan, precision: str):
    """The attention callable of a session that has this plan and no dense steps, and the session."""
    settings = Settings(
        preset="custom", density=max(plan.density, 0.01), precision=precision, dense_steps=0, min_tokens=0, strict=True
    )
    session = Session(Policy(IDENTITY, recipe_for("wan"), settings, plan=plan), sigmas=[1.0, 0.0])
    evaluation = session.begin(layout=layout, sigma=1.0)

    def attention(q, k, v, *, layer):
        return evaluation.attend(Site("double", layer), q, k, v, dense=lambda: dense_attention(q, k, v, layer=layer))

    return attention, session


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1.3b,14b")
    parser.add_argument("--grids", default="480p,720p")
    parser.add_argument("--densities", default="0.3,0.2,0.1")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing is measured")
    import triton

    results = {
        "benchmark": "end_to_end",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "weights": "random",
        "rows": [],
    }
    for name in args.models.split(","):
        config = MODELS[name]
        model = random_model(config)
        for size in args.grids.split(","):
            grid = GRIDS[size]
            layout = TokenLayout(0, grid)
            dense = time_step(model, grid, dense_attention)
            rows = [{"model": name, "grid": size, "tokens": layout.length, "method": "dense", **dense}]
            for density in map(float, args.densities.split(",")):
                plan = banded_plan(layout, config.heads, config.layers, density)
                attention, session = paro_attention(layout, plan, args.precision)
                row = time_step(model, grid, attention)
                report = session.finish()
                rows.append(
                    {
                        "model": name,
                        "grid": size,
                        "tokens": layout.length,
                        "method": "paro",
                        "density": plan.density,
                        "precision": report.precision,
                        "sites_sparse": report.sites_sparse,
                        "step_gain": dense["step_ms"] / row["step_ms"],
                        "attention_gain": dense["attention_ms"] / row["attention_ms"],
                        **row,
                    }
                )
            for row in rows:
                print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            results["rows"] += rows
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        del model
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
