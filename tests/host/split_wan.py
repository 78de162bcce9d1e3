"""Wan in the real host, its tokens split over ranks as packs for several GPUs do it: what `test_several_gpus.py` runs.

Blocks and self-attention get a forward of their own. Such packs hand the exchanged heads to a library's attention;
here they go to the host's, with the call's `transformer_options`, where PARO's override is.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist

if "comfyui_paro" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "_checkout", Path(__file__).resolve().parent.parent.parent / "scripts" / "_checkout.py"
    )
    _checkout = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_checkout)
    _checkout.register()

from comfyui_paro.paro_runtime.plan.store import PlanStore
from comfyui_paro.paro_runtime.run.ulysses import Ulysses
from comfyui_paro.tests.ranks import be_rank, part_of

GRID, STEPS = (5, 7, 9), 4  # 315 tokens
SETTINGS = {"preset": "custom", "density": 0.4, "dense_steps": 1, "budget": "per_head", "precision": "16bit"}


def split(wan, ulysses: Ulysses, told: bool = True) -> None:
    """Give the blocks of a `WanModel` their part of the tokens. told: attention is told where it belongs."""
    from comfy.ldm.modules.attention import optimized_attention
    from comfy.ldm.wan.model import apply_rope1

    def attend(module, x, freqs, transformer_options):
        shape = (*x.shape[:2], module.num_heads, module.head_dim)
        q, k = (
            apply_rope1(norm(linear(x)).view(shape), freqs).transpose(1, 2)
            for norm, linear in ((module.norm_q, module.q), (module.norm_k, module.k))
        )
        options = {"transformer_options": transformer_options} if told else {}

        def whole(q, k, v):
            return optimized_attention(
                q, k, v, heads=q.shape[1], skip_reshape=True, skip_output_reshape=True, **options
            )

        out = ulysses.attend(whole, q, k, module.v(x).view(shape).transpose(1, 2))
        return module.o(out.transpose(1, 2).flatten(2))

    def through(forward, place, x, freqs, **rest):
        u = ulysses
        x = forward(x if place else part_of(x, 1, u.rank, u.ranks), freqs=part_of(freqs, 1, u.rank, u.ranks), **rest)
        if place < len(wan.blocks) - 1:
            return x
        parts = [torch.empty_like(x) for _ in range(u.ranks)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)[:, : u.length]

    for place, block in enumerate(wan.blocks):
        attention = block.self_attn
        attention.forward = lambda x, freqs, transformer_options, its=attention: attend(
            its, x, freqs, transformer_options
        )
        block.forward = lambda x, freqs, its=block.forward, at=place, **rest: through(its, at, x, freqs, **rest)


def results(device: str) -> dict:
    """Of one rank: latents dense and sparse, what PARO did, and what it says where attention is not told."""
    from comfyui_paro.scripts._host import find_host
    from comfyui_paro.scripts.comfy_boot import boot

    boot(find_host(), device)
    from comfyui_paro.tests.host import tiny

    model = tiny.load(tiny.build_wan(Path(sys.argv[3]) / f"wan{dist.get_rank()}.safetensors"))
    split(model.model.diffusion_model, Ulysses((315,)))
    plans = Path(sys.argv[3]) / f"plans{dist.get_rank()}"
    sparse = tiny.patched(model, store=PlanStore([], plans), **SETTINGS)
    found = {"dense": tiny.sample(model, GRID, steps=STEPS), "sparse": tiny.sample(sparse, GRID, steps=STEPS)}
    report = tiny.report(sparse)
    found |= {
        "calls": report.calls,
        "fallbacks": report.fallbacks,
        "heads": len(next(iter(report.plan.sites.values())).orders),
    }
    untold = tiny.load(tiny.build_wan(Path(sys.argv[3]) / f"untold{dist.get_rank()}.safetensors"))
    split(untold.model.diffusion_model, Ulysses((315,)), told=False)
    passed = tiny.patched(untold, **SETTINGS)
    found["untold"] = tiny.sample(passed, GRID, steps=STEPS)
    return found | {"passed": str(tiny.report(passed).status()), "seen": tiny.report(passed).passed}


if __name__ == "__main__":
    be_rank(results)
