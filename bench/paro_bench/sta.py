"""Suite `sta`: the windows that Sliding Tile Attention found for HunyuanVideo, as attention, under our orders.

The only evidence here that comes from the weights of a published model for video. A window says which tiles of
6 x 8 x 8 tokens a tile looks at; the suite asks which share of the 64 x 64 blocks holds any of it under each order, and
which order our selector takes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch

from ...paro_runtime.calibration.order_choice import first_best, mass_kept_scores
from ...paro_runtime.plan.orders import AXIS_ORDERS, order_table, tiled_orders

TABLE = Path(__file__).resolve().parents[2] / "calib_presets" / "priors" / "hunyuan_sta.json"
NAMES = {"t": "temporal", "s": "spatial", "b": "3-D", "h": "H-local", "w": "W-local"}
# Density at which the selector compares orders.
SELECT_AT = 0.2


@lru_cache(maxsize=1)
def published() -> dict:
    """The derived table, with `heads`: per (layer, head) a count of steps per window letter."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    heads = {}
    for layer, line in enumerate(table["layers"]):
        for head, word in enumerate(line.split()):
            runs = re.findall(r"([a-z])(\d+)", word)
            heads[layer, head] = Counter()
            for letter, count in runs:
                heads[layer, head][letter] += int(count)
    return {**table, "heads": heads}


def window_tiles(window: list[int], grid: list[int], tile: list[int]) -> torch.Tensor:
    """Which key tiles each query tile looks at: bool `[tiles, tiles]`. The window's centre stays inside the grid."""
    counts = [n // t for n, t in zip(grid, tile, strict=True)]
    axes = torch.meshgrid(*(torch.arange(n) for n in counts), indexing="ij")
    inside = torch.ones(math.prod(counts), math.prod(counts), dtype=torch.bool)
    for axis, n, w in zip(axes, counts, window, strict=True):
        at = axis.flatten()
        if w < n:
            centre = at.clamp(w // 2, n - 1 - (w - 1 - w // 2))
            inside &= (centre[:, None] - at[None]).abs() <= w // 2
    return inside


def blocks_to_tiles(order: str, grid: list[int], tile: list[int], size: int) -> torch.Tensor:
    """Tokens of each tile in each block of the order, float32 `[blocks, tiles]`."""
    index = order_table(order, tuple(grid)).long()
    _, h, w = grid
    counts = [n // t for n, t in zip(grid, tile, strict=True)]
    f, y, x = index // (h * w) // tile[0], index // w % h // tile[1], index % w // tile[2]
    tiles = (f * counts[1] + y) * counts[2] + x
    table = torch.zeros(-(-index.numel() // size), math.prod(counts))
    return table.index_put_((torch.arange(index.numel()) // size, tiles), torch.ones(1), accumulate=True)


def analyse(block_q: int = 64, orders: tuple[str, ...] = AXIS_ORDERS) -> dict[str, dict[str, tuple[float, float]]]:
    """Per window letter and order: density of the blocks that hold any of the window, and the selector's score."""
    table = published()
    grid, tile = table["grid"], table["tile"]
    found: dict[str, dict] = {letter: {} for letter in NAMES}
    for order in orders:
        rows, columns = (blocks_to_tiles(order, grid, tile, size) for size in (block_q, 64))
        for letter in NAMES:
            inside = window_tiles(table["windows"][letter], grid, tile).float()
            mass = rows @ (inside / inside.sum(1, keepdim=True)) @ columns.T
            density = (mass > 0).float().mean().item()
            score = mass_kept_scores([mass[None]], SELECT_AT)[0, 0].item()
            found[letter][order] = density, score
    return found


def run(block_q: int = 64, tiles: bool = False) -> dict:
    """Average block density over all heads and steps: original order, selector's order per head, best and ideal."""
    table = published()
    orders = AXIS_ORDERS + (tiled_orders(tuple(table["grid"])) if tiles else ())
    found = analyse(block_q, orders)
    density = {letter: torch.tensor([found[letter][o][0] for o in orders]) for letter in NAMES}
    score = {letter: torch.tensor([found[letter][o][1] for o in orders]) for letter in NAMES}
    totals = torch.zeros(len(orders))
    chosen, best, ideal, regret, picks = 0.0, 0.0, 0.0, 0.0, Counter()
    tile_count = math.prod(n // t for n, t in zip(table["grid"], table["tile"], strict=True))
    for steps in table["heads"].values():
        known = {letter: count for letter, count in steps.items() if letter in NAMES}
        share = {letter: count / sum(known.values()) for letter, count in known.items()}
        needed = sum(density[letter] * part for letter, part in share.items())
        pick = int(first_best(sum(score[letter] * part for letter, part in share.items())[None])[0])
        picks[orders[pick]] += 1
        totals += needed
        chosen += needed[pick].item()
        best += needed.min().item()
        regret = max(regret, (needed[pick] - needed.min()).item())
        ideal += sum(math.prod(table["windows"][letter]) / tile_count * part for letter, part in share.items())
    heads = len(table["heads"])
    return {
        "block_q": block_q,
        "tiles": tiles,
        "windows": {NAMES[w]: {o: round(d, 4) for o, (d, _) in found[w].items()} for w in NAMES},
        "one_order_for_all": {o: round(t / heads, 4) for o, t in zip(orders, totals.tolist(), strict=True)},
        "original": round(totals[0].item() / heads, 4),
        "selected": round(chosen / heads, 4),
        "best_per_head": round(best / heads, 4),
        "worst_regret": round(regret, 4),
        "ideal": round(ideal / heads, 4),
        "picks": dict(picks),
    }


def table(records: list[dict]) -> str:
    """Markdown: block density per window and order, then the averages."""
    lines = []
    for r in records:
        orders = list(r["one_order_for_all"])
        lines += [f"Query blocks of {r['block_q']}:", "", "| window | " + " | ".join(orders) + " |"]
        lines.append("|---|" + "---|" * len(orders))
        for name, values in [*r["windows"].items(), ("all heads", r["one_order_for_all"])]:
            lines.append(f"| {name} | " + " | ".join(f"{values[o]:.3f}" for o in orders) + " |")
        lines += [
            "",
            f"original order {r['original']:.3f}, selected per head {r['selected']:.3f}, best per head "
            f"{r['best_per_head']:.3f}, ideal {r['ideal']:.3f}; picks {r['picks']}",
            "",
        ]
    return "\n".join(lines)
