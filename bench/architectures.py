"""Transformers at real sizes with random weights, one attention hook each: what surrounds attention in one step.

Wan 2.1 is the architecture of tests/tiny_wan at Wan's widths. Flux 1 and HunyuanVideo 1.5 are written here from the
published descriptions (two-stream blocks whose text and image tokens attend jointly; Flux adds one-stream blocks with
parallel feed-forward). Shapes, norms, rotary embedding and feed-forward are the models'; text encoders and embedders of
a few milliseconds are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.tests.tiny_wan.model import AttentionFn, TinyWan, TinyWanConfig, rope_table, rotate


@dataclass(frozen=True)
class JointConfig:
    """Widths and depths of a model of joint attention; text tokens stand before or behind the image's."""

    dim: int
    double: int
    single: int
    text_tokens: int
    text_first: bool
    mlp: int = 4
    head_dim: int = 128

    @property
    def heads(self) -> int:
        return self.dim // self.head_dim

    @property
    def layers(self) -> int:
        return self.double + self.single


class _Modulation(nn.Module):
    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.lin, self.parts = nn.Linear(dim, parts * dim), parts

    def forward(self, vec: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, -1)


def _normed(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def _heads(qkv: torch.Tensor, heads: int, norms: nn.ModuleList) -> tuple[torch.Tensor, ...]:
    """`[B, L, 3 dim]` -> q, k (RMS-normed per head) and v, `[B, L, heads, D]` views."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    return norms[0](q), norms[1](k), v


class _Stream(nn.Module):
    """One of the two streams of a double block."""

    def __init__(self, c: JointConfig) -> None:
        super().__init__()
        self.modulation, self.qkv, self.proj = (
            _Modulation(c.dim, 6),
            nn.Linear(c.dim, 3 * c.dim),
            nn.Linear(c.dim, c.dim),
        )
        self.norms = nn.ModuleList(nn.RMSNorm(c.head_dim, eps=1e-6) for _ in range(2))
        hidden = c.mlp * c.dim
        self.mlp = nn.Sequential(nn.Linear(c.dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, c.dim))
        self.heads = c.heads

    def before(self, x, vec):
        parts = self.modulation(vec)
        return parts, _heads(self.qkv(_normed(x, parts[0], parts[1])), self.heads, self.norms)

    def after(self, x, parts, attended):
        x = torch.addcmul(x, self.proj(attended), parts[2])
        return torch.addcmul(x, self.mlp(_normed(x, parts[3], parts[4])), parts[5])


class _Double(nn.Module):
    def __init__(self, c: JointConfig) -> None:
        super().__init__()
        self.image, self.text, self.first = _Stream(c), _Stream(c), c.text_first

    def forward(self, image, text, vec, rope, attend, layer):
        image_parts, image_qkv = self.image.before(image, vec)
        text_parts, text_qkv = self.text.before(text, vec)
        both = (text_qkv, image_qkv) if self.first else (image_qkv, text_qkv)
        q, k, v = (torch.cat(pair, 1) for pair in zip(*both, strict=True))
        out = attend(q, k, v, rope, layer)
        sizes = [both[0][0].shape[1], both[1][0].shape[1]]
        parts = out.split(sizes, 1)
        text_out, image_out = parts if self.first else parts[::-1]
        return self.image.after(image, image_parts, image_out), self.text.after(text, text_parts, text_out)


class _Single(nn.Module):
    def __init__(self, c: JointConfig) -> None:
        super().__init__()
        self.modulation = _Modulation(c.dim, 3)
        self.linear1, self.linear2 = nn.Linear(c.dim, (3 + c.mlp) * c.dim), nn.Linear((1 + c.mlp) * c.dim, c.dim)
        self.norms = nn.ModuleList(nn.RMSNorm(c.head_dim, eps=1e-6) for _ in range(2))
        self.c = c

    def forward(self, x, vec, rope, attend, layer):
        shift, scale, gate = self.modulation(vec)
        qkv, hidden = self.linear1(_normed(x, shift, scale)).split([3 * self.c.dim, self.c.mlp * self.c.dim], -1)
        out = attend(*_heads(qkv, self.c.heads, self.norms), rope, layer)
        return torch.addcmul(x, self.linear2(torch.cat([out, F.gelu(hidden, approximate="tanh")], -1)), gate)


class JointTransformer(nn.Module):
    """Double blocks, then single blocks over text and image together; `[B, N, dim]` image tokens in and out."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.config = config
        self.double_blocks = nn.ModuleList(_Double(config) for _ in range(config.double))
        self.single_blocks = nn.ModuleList(_Single(config) for _ in range(config.single))

    def forward(self, image, text, vec, rope, attention: AttentionFn) -> torch.Tensor:
        """image `[B, N, dim]`, text `[B, T, dim]`, vec `[B, dim]`, rope `[N + T, D/2, 2]` in the joint order."""

        def attend(q, k, v, rope, layer):
            q, k = rotate(q, rope), rotate(k, rope)
            out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layer=layer)
            return out.transpose(1, 2).flatten(2)

        for i, block in enumerate(self.double_blocks):
            image, text = block(image, text, vec, rope, attend, i)
        if not self.single_blocks:
            return image
        first = self.config.text_first
        x = torch.cat([text, image] if first else [image, text], 1)
        for i, block in enumerate(self.single_blocks):
            x = block(x, vec, rope, attend, self.config.double + i)
        return x[:, text.shape[1] :] if first else x[:, : image.shape[1]]


MODELS = {
    "wan1.3b": TinyWanConfig(dim=1536, layers=30, ffn_dim=8960),
    "wan14b": TinyWanConfig(dim=5120, layers=40, ffn_dim=13824),
    "hunyuan15": JointConfig(dim=2048, double=54, single=0, text_tokens=256, text_first=False),
    "flux": JointConfig(dim=3072, double=19, single=38, text_tokens=512, text_first=True),
}
# Token grids F x H x W of each model's usual sizes.
GRIDS = {
    "wan1.3b": {"480p": (21, 30, 52), "720p": (21, 45, 80)},
    "wan14b": {"480p": (21, 30, 52), "720p": (21, 45, 80)},
    "hunyuan15": {"480p": (31, 30, 53), "720p": (31, 45, 80)},
    "flux": {"1024": (1, 64, 64), "2048": (1, 128, 128)},
}
RECIPES = {"wan1.3b": "wan", "wan14b": "wan", "hunyuan15": "hunyuan_video", "flux": "flux"}
TITLES = {"wan1.3b": "Wan 2.1 1.3B", "wan14b": "Wan 2.1 14B", "hunyuan15": "HunyuanVideo 1.5", "flux": "Flux 1"}


def layout_of(name: str, grid: tuple[int, int, int]) -> TokenLayout:
    """Where the text stands in that model's sequence."""
    config = MODELS[name]
    if isinstance(config, TinyWanConfig):
        return TokenLayout(0, grid)
    return TokenLayout(config.text_tokens, grid) if config.text_first else TokenLayout(0, grid, config.text_tokens)


def random_model(name: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, config=None) -> nn.Module:
    """The model with weights N(0, 1 / width) and norms of one; `config` instead of the named one for a small copy."""
    config = config or MODELS[name]
    with torch.device("meta"):
        model = TinyWan(config) if isinstance(config, TinyWanConfig) else JointTransformer(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if "norm" in key and key.endswith("weight"):
            parameter.fill_(1)
        else:
            parameter.normal_(0, 0.02)
    return model


def step_of(model: nn.Module, grid: tuple[int, int, int]) -> Callable[[AttentionFn], torch.Tensor]:
    """One evaluation of the model on random inputs, as a function of the attention that it is to use."""
    weight = next(model.parameters())
    options = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(model, TinyWan):
        x = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2], **options)
        context, t = torch.randn(1, 512, 4096, **options), torch.full((1,), 500.0, device=weight.device)
        return lambda attention: model(x, t, context, attention)
    c = model.config
    image, text = torch.randn(1, math.prod(grid), c.dim, **options), torch.randn(1, c.text_tokens, c.dim, **options)
    vec = torch.randn(1, c.dim, **options)
    # Text tokens stand at position zero, where the rotation is the identity.
    rope = rope_table(grid, c.head_dim).to(weight.device)
    still = torch.tensor([1.0, 0.0], device=weight.device).expand(c.text_tokens, rope.shape[1], 2)
    rope = torch.cat([still, rope] if c.text_first else [rope, still])
    return lambda attention: model(image, text, vec, rope, attention)
