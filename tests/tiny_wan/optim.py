"""Muon with the Newton-Schulz iterations of all equally shaped matrices run as one batched product.

`torch.optim.Muon` loops over matrices, which at width 256 spends its time launching kernels. Same rule:
Nesterov momentum, five quintic Newton-Schulz steps (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon), update scaled to AdamW's RMS with 0.2 * sqrt(max(rows, cols))
(Moonshot AI 2025, arXiv 2502.16982).
"""

import math

import torch
from torch import Tensor


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """Approximate orthogonal factor of each matrix of `stack` `[M, rows, cols]`, rows <= cols, in bf16."""
    x = stack.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x


class BatchedMuon:
    """Muon over 2-D parameters, grouped by shape. `step(lr)` reads `.grad` and updates in place."""

    def __init__(self, params: list[Tensor], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        groups: dict[tuple[int, int], list[Tensor]] = {}
        for p in params:
            groups.setdefault((min(p.shape), max(p.shape)), []).append(p)
        self.groups = list(groups.values())
        self.buffers = [[torch.zeros_like(p) for p in group] for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at learning rate `lr` (in AdamW units)."""
        for group, buffers in zip(self.groups, self.buffers, strict=True):
            grads = [p.grad for p in group]
            torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
            ahead = torch._foreach_lerp(grads, buffers, self.momentum)
            stack = torch.stack([g if g.shape[0] <= g.shape[1] else g.T for g in ahead])
            scale = 0.2 * math.sqrt(max(group[0].shape))
            update = orthogonalise(stack).float().unbind(0)
            turned = [u if p.shape[0] <= p.shape[1] else u.T for p, u in zip(group, update, strict=True)]
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, [t.contiguous() for t in turned], alpha=-lr * scale)
