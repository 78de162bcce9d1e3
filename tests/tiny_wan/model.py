"""TinyWan: the Wan 2.1 text-to-video transformer, small enough to train in minutes, with one attention hook.

The architecture follows the published Wan 2.1 model (https://github.com/Wan-Video/Wan2.1, Apache-2.0) at
width 256; every state-dict key carries the name and layout that ComfyUI's Wan loader expects, so a saved
state dict is an ordinary diffusion model file. Written from the published formulas, without the host's
code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

AttentionFn = Callable[..., Tensor]
"""`attention(q, k, v, *, layer) -> out`, all `[B, heads, N, 128]`, q and k after RMS norm and RoPE."""


@dataclass(frozen=True)
class TinyWanConfig:
    """Sizes. The host derives heads as dim // 128 and fixes patch (1, 2, 2), freq_dim 256 and eps 1e-6."""

    dim: int = 256
    layers: int = 4
    ffn_dim: int = 512
    channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def heads(self) -> int:
        """Number of attention heads of width 128."""
        return self.dim // 128


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Timestep features `[cos(t w), sin(t w)]`, w_i = 10000^(-i / (width/2)).

    `t` is `[B]` in 0..1000 (1000 * sigma); the result is `[B, width]` in fp32.
    """
    half = width // 2
    freqs = torch.pow(10000.0, -torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = torch.outer(t.float(), freqs)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rope_table(grid: tuple[int, int, int], head_dim: int = 128, theta: float = 10000.0) -> Tensor:
    """Rotary table `[N, head_dim/2, 2]` = (cos, sin) for a token grid (T, h, w), N = T*h*w with w fastest.

    The head width is split d - 4*(d//6) | 2*(d//6) | 2*(d//6) for the three axes (44 | 42 | 42 at d = 128);
    each axis uses angles position * theta^(-2i/width). Computed in fp64, returned in fp32 on the CPU.
    """
    sixth = 2 * (head_dim // 6)
    widths = (head_dim - 2 * sixth, sixth, sixth)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = []
    for axis, width in zip(axes, widths, strict=True):
        omega = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles.append(axis.reshape(-1, 1) * omega)
    full = torch.cat(angles, dim=1)
    return torch.stack([full.cos(), full.sin()], dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs of `x` `[B, N, heads, D]` by `table` `[N, D/2, 2]` in fp32, keeping the dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width before the head split, in fp32. `[..., dim]` -> same."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return `x / rms(x) * weight` in the dtype of `x`."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Self-attention (with RoPE and the hook) or cross-attention (with a context, without RoPE)."""

    def __init__(self, cfg: TinyWanConfig, layer: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim, cfg.eps), RMSNorm(cfg.dim, cfg.eps)
        self.heads = cfg.heads
        self.layer = layer

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        rope: Tensor | None = None,
        hook: AttentionFn | None = None,
    ) -> Tensor:
        """`x` `[B, N, dim]`, `context` `[B, L, dim]` or None for self-attention; returns `[B, N, dim]`."""
        source = x if context is None else context
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        k = self.norm_k(self.k(source)).unflatten(-1, (self.heads, -1))
        v = self.v(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v) if hook is None else hook(q, k, v, layer=self.layer)
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One transformer block: modulated self-attention, ungated cross-attention, modulated feed-forward."""

    def __init__(self, cfg: TinyWanConfig, layer: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / math.sqrt(cfg.dim))
        self.self_attn = Attention(cfg, layer)
        self.norm3 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.cross_attn = Attention(cfg, layer)
        self.ffn = nn.Sequential(
            nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(cfg.ffn_dim, cfg.dim)
        )
        self.eps = cfg.eps

    def forward(self, x: Tensor, e0: Tensor, context: Tensor, rope: Tensor, hook: AttentionFn | None = None) -> Tensor:
        """Map `x` `[B, N, dim]`; time modulation `e0` `[B, 6, dim]`, `context` `[B, L, dim]`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e0).chunk(6, dim=1)
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale1) + shift1
        x = x + self.self_attn(y, rope=rope, hook=hook) * gate1
        x = x + self.cross_attn(self.norm3(x), context=context)
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale2) + shift2
        return x + self.ffn(y) * gate2


class Head(nn.Module):
    """Modulated output projection to channels * patch volume values per token."""

    def __init__(self, cfg: TinyWanConfig) -> None:
        super().__init__()
        self.head = nn.Linear(cfg.dim, cfg.channels * math.prod(cfg.patch))
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / math.sqrt(cfg.dim))
        self.eps = cfg.eps
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """`x` `[B, N, dim]`, time embedding `e` `[B, dim]`; returns `[B, N, 64]` as (ph, pw, channel)."""
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
        return self.head(F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift)


class TinyWan(nn.Module):
    """The whole model. 123 tensors, 4,843,840 parameters at the default sizes."""

    def __init__(self, cfg: TinyWanConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or TinyWanConfig()
        self.patch_embedding = nn.Conv3d(cfg.channels, cfg.dim, cfg.patch, stride=cfg.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(cfg.text_dim, cfg.dim), nn.GELU(approximate="tanh"), nn.Linear(cfg.dim, cfg.dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.layers))
        self.head = Head(cfg)
        self._ropes: dict[tuple, Tensor] = {}

    def _rope(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        key = (*grid, str(device))
        if key not in self._ropes:
            self._ropes[key] = rope_table(grid).to(device)
        return self._ropes[key]

    def forward(self, x: Tensor, t: Tensor, context: Tensor, attention: AttentionFn | None = None) -> Tensor:
        """Predict the flow-matching velocity (noise - clean).

        `x` `[B, 16, T, H', W']` latent, `t` `[B]` in 0..1000, `context` `[B, L, 4096]`; returns the shape
        of `x`. Odd H' or W' are padded circularly to the patch size and cropped afterwards. `attention`
        replaces every self-attention (see `AttentionFn`); None means
        `torch.nn.functional.scaled_dot_product_attention`.
        """
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, width % 2, 0, height % 2, 0, 0), mode="circular")
        batch, channels, frames, rows, cols = x.shape
        grid = (frames, rows // 2, cols // 2)
        # A convolution whose kernel equals its stride is a linear map of patches ordered (channel, ph, pw).
        patches = x.reshape(batch, channels, frames, grid[1], 2, grid[2], 2).permute(0, 2, 3, 5, 1, 4, 6)
        weight = self.patch_embedding.weight.flatten(1)
        patches = patches.reshape(batch, -1, channels * 4)
        tokens = F.linear(patches, weight, self.patch_embedding.bias).to(x.dtype)
        e = self.time_embedding(sinusoid(t, self.cfg.freq_dim).to(x.dtype))
        e0 = self.time_projection(e).unflatten(1, (6, -1))
        text = self.text_embedding(context.to(x.dtype))
        rope = self._rope(grid, x.device)
        for block in self.blocks:
            tokens = block(tokens, e0, text, rope, attention)
        out = self.head(tokens, e).reshape(batch, *grid, 2, 2, channels)
        out = out.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, channels, frames, rows, cols)
        return out[..., :height, :width]


def load_tiny_wan(path: str | Path | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TinyWan:
    """Load a checkpoint (by default the committed one), in evaluation mode with gradients off."""
    from safetensors.torch import load_file

    path = path or Path(__file__).with_name("paro-tiny-wan.safetensors")
    model = TinyWan()
    model.load_state_dict(load_file(path))
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
