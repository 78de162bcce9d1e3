"""Short runs on a CPU, for the tests of this folder."""

import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.config.recipes import recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.run.policy import Policy
from torch.nn.functional import scaled_dot_product_attention as sdpa

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
LAYOUT = TokenLayout(3, (4, 8, 10), 2)
IDENTITY = ModelIdentity("wan", "a" * 16, "b" * 16)
SITES = [Site("double", i) for i in range(3)]
DEFAULT = Settings(density=0.3, dense_steps=2)


def policy(settings=None, store=None, plan=None, identity=IDENTITY):
    return Policy(identity, recipe_for("wan"), settings or DEFAULT, plan, store, remember=True)


def tensors(site, step, layout=LAYOUT, heads=4, dim=32, kv_heads=None):
    """The same q, k, v for the same site and step."""
    generator = torch.Generator().manual_seed(100 * site.block_index + step)
    shape = (1, heads, layout.length, dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    if kv_heads:
        k, v = k[:, :kv_heads], v[:, :kv_heads]
    return q, k, v


def sample(session, *, layout=LAYOUT, sigmas=SIGMAS, kv_heads=None, change=None, blocks=3):
    """Run every step and site; returns {(step, site): (out, dense)}."""
    results = {}
    for step, sigma in enumerate(sigmas[:-1]):
        evaluation = session.begin(layout=layout, sigma=sigma)
        for site in SITES:
            q, k, v = tensors(site, step, layout, kv_heads=kv_heads)
            if change:
                q, k, v = change(step, site, q, k, v)
            group = q.shape[1] // k.shape[1]
            dense = sdpa(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
            out = evaluation.attend(site, q, k, v, dense=lambda d=dense: d, blocks=blocks)
            results[step, site] = (out, dense)
        evaluation.end()
    return results


def was_dense(pair):
    return torch.equal(*pair)
