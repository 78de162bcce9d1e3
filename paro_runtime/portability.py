"""A plan made on one grid, used on another: orders carry over, masks are resampled through token coordinates.

A block of the new grid covers a region of the picture in space and time; what the old plan kept between the regions
that two new blocks cover, and how near they are, decides whether their pair is kept. Nearness counts along those axes
along which the old mask shows the head to be local. Each head keeps its density and a tenth more.

Nobody knows what a moved mask keeps until it is used, so the run measures it on a few rows and calibrates anew below a
floor.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from ..kernels.problem import BLOCK_K, Geometry
from .orders import order_table
from .plan import Plan, SitePlan
from .recipes import query_block
from .tail import kept_on_rows
from .tokens import TokenLayout

# A moved plan that keeps less than this share of what it kept where it was made is calibrated anew.
KEPT_FLOOR = 0.9
# How much nearness counts against the old mask's verdict (0 to 1). Measured on the planted heads: a locality length is
# a number of tokens, so on a finer grid the old mask is too wide and nearness must be able to overrule it.
NEARNESS = 4.0
# A moved mask keeps this much more than the density it was made for: it is less exact than one made on the grid.
EXTRA = 1.1


def _coordinates(order: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """Token coordinates in whole tokens along F, H, W at each position of the order, int64 `[N, 3]`."""
    index = order_table(order, grid).long()
    _, h, w = grid
    return torch.stack([index // (h * w), index // w % h, index % w], 1)


@lru_cache(maxsize=64)
def _overlap(order: str, old: tuple[int, int, int], new: tuple[int, int, int], old_size: int, new_size: int):
    """float32 `[new blocks, old blocks]`: share of a new block's tokens that lie in the region of an old block."""
    _, h, w = old
    position = torch.empty(old[0] * h * w, dtype=torch.long)
    table = order_table(order, old).long()
    position[table] = torch.arange(table.numel())
    at = _coordinates(order, new)
    f, y, x = (((at[:, axis] * 2 + 1) * old[axis] // (2 * new[axis])) for axis in range(3))
    old_block = position[(f * h + y) * w + x] // old_size
    new_block = torch.arange(at.shape[0]) // new_size
    table = torch.zeros(-(-at.shape[0] // new_size), -(-position.numel() // old_size))
    table.index_put_((new_block, old_block), torch.ones(at.shape[0]), accumulate=True)
    return table / table.sum(1, keepdim=True)


@lru_cache(maxsize=64)
def _distances(order: str, grid: tuple[int, int, int], block_q: int) -> torch.Tensor:
    """Mean distance between the tokens of two blocks along each axis, in shares of its extent: `[3, q, k]`."""
    at = _coordinates(order, grid).float() / torch.tensor(grid)

    def centres(size: int) -> torch.Tensor:
        parts = at.split(size)
        return torch.stack([part.mean(0) for part in parts])

    return (centres(block_q)[:, None] - centres(BLOCK_K)[None]).abs().permute(2, 0, 1)


def _move_head(mask: torch.Tensor, order: str, old: TokenLayout, new: TokenLayout, old_q: int, new_q: int):
    """One head's mask `[q_blocks, k_blocks]` on the new grid."""
    rows = _overlap(order, old.grid, new.grid, old_q, new_q)
    columns = _overlap(order, old.grid, new.grid, BLOCK_K, BLOCK_K)
    verdict = rows @ mask.float() @ columns.T
    away = _distances(order, old.grid, old_q)
    usual = away.mean((1, 2)).clamp_min(1e-6)
    local = (1 - (away * mask).sum((1, 2)) / mask.sum() / usual).clamp_min(0)
    far = (_distances(order, new.grid, new_q) * local[:, None, None]).sum(0)
    score = verdict - NEARNESS * far / far.amax().clamp_min(1e-6)
    count = max(1, min(score.numel(), round(EXTRA * mask.float().mean().item() * score.numel())))
    moved = torch.zeros_like(score, dtype=torch.bool)
    moved.view(-1)[score.flatten().topk(count).indices] = True
    return moved.scatter_(1, score.argmax(1, keepdim=True), True)


def move_plan(plan: Plan, layout: TokenLayout) -> Plan:
    """The plan for another grid of the same model. What it keeps there is only expected, not measured."""
    if plan.layout.grid == layout.grid:
        return plan if plan.layout == layout else replace(plan, layout=layout)
    block_q = query_block(layout.grid_tokens)
    sites = {}
    for site, entry in plan.sites.items():
        moved = [
            _move_head(mask, order, plan.layout, layout, plan.block_q, block_q)
            for mask, order in zip(entry.mask(), entry.orders, strict=True)
        ]
        sites[site] = SitePlan.create(entry.orders, torch.stack(moved), entry.tail_bias, entry.mass_kept)
    made = {**plan.made, "moved_from": "x".join(map(str, plan.layout.grid))}
    return Plan(plan.identity, layout, block_q, sites, plan.pool, plan.settings, made)


class MovedPlanCheck:
    """What a moved plan keeps, measured on the rows of the first evaluation that uses it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._kept: dict = {}

    def measure(self, site, q: torch.Tensor, k: torch.Tensor, *, scale: float | None, key_bias) -> None:
        """Look at one site's call, q `[B, Hq, L, D]`, k `[B, Hkv, L, D]`; a site counts once."""
        entry = self.plan.sites.get(site)
        if entry is None or site in self._kept:
            return
        layout = self.plan.layout
        geometry = Geometry(layout.prefix, layout.grid, layout.suffix, self.plan.block_q)
        tables = torch.stack([order_table(name, layout.grid) for name in entry.orders]).to(q.device)
        kept = kept_on_rows(q, k, geometry, tables, entry.mask(q.device), scale=scale, key_bias=key_bias)
        self._kept[site] = kept.mean().item(), entry.mass_kept.mean().item()

    def verdict(self) -> tuple[bool, str] | None:
        """Whether the plan may stay, and a line about it; None before anything was measured."""
        if not self._kept:
            return None
        measured = sum(now for now, _ in self._kept.values()) / len(self._kept)
        expected = sum(then for _, then in self._kept.values()) / len(self._kept)
        stays = measured >= KEPT_FLOOR * expected
        text = (
            f"plan: moved from the grid {self.plan.made.get('moved_from', '?')}, keeps {measured:.1%} of the attention "
            f"here and kept {expected:.1%} there"
        )
        return stays, text if stays else f"{text}; calibrating anew"
