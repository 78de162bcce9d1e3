"""A plan as a picture: layers down, heads across, colour for the order, brightness for the density."""

from __future__ import annotations

import torch

from ..plan.orders import ALL_ORDERS
from ..plan.plan import Plan
from .reasons import layer_words
from .sentences import joined, say
from .verdict import range_of, share

# One colour per order, told apart also without red-green vision (Okabe and Ito's palette).
ORDER_COLOURS = dict(
    zip(
        ALL_ORDERS,
        (
            (120, 120, 120),
            (86, 180, 233),
            (0, 114, 178),
            (230, 159, 0),
            (0, 158, 115),
            (213, 94, 0),
            (204, 121, 167),
            (240, 228, 66),
            (170, 110, 40),
            (220, 190, 255),
        ),
        strict=True,
    )
)


def plan_picture(plan: Plan) -> torch.Tensor:
    """Two panels, sites down and heads across: colour = order, brightness = density. float32 `[1, h, w, 3]`, 0..1."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont  # the host's own dependency; only pictures need it

    sites = sorted(plan.sites.items())
    heads = max(len(entry.orders) for _, entry in sites)
    cell = max(6, min(28, 700 // max(heads, len(sites) // 2)))
    left, top, gap, legend = 140, 66, 48, 30
    panel = heads * cell
    right = left + max(panel + gap, 190)  # the titles stand side by side
    width = max(right + panel + 90, 620)
    height = top + len(sites) * cell + legend + 24
    image = Image.new("RGB", (width, height), (24, 24, 27))
    draw = ImageDraw.Draw(image)
    font, ink = ImageFont.load_default(), (228, 228, 231)
    grid = "x".join(map(str, plan.layout.grid))
    title = f"{plan.identity.family}   {grid} tokens   {kept_text(plan)}"
    draw.text((12, 10), title, ink, font)
    draw.text((left, top - 30), "token order of each head", ink, font)
    draw.text((right, top - 30), "blocks kept of each head", ink, font)
    every = max(1, 14 // cell)
    for row, (site, entry) in enumerate(sites):
        y = top + row * cell
        if row % every == 0:
            draw.text((12, y + cell // 2 - 6), layer_words(site.name), ink, font)
        for column, (name, density) in enumerate(zip(entry.orders, entry.density.mean(0).tolist(), strict=True)):
            box = (column * cell, y, column * cell + cell - 2, y + cell - 2)
            draw.rectangle((left + box[0], box[1], left + box[2], box[3]), fill=ORDER_COLOURS[name])
            shade = int(40 + 215 * min(1.0, density))
            place = (right + box[0], box[1], right + box[2], box[3])
            draw.rectangle(place, fill=(shade, int(shade * 0.8), 40))
            if cell >= 26:
                draw.text((place[0] + 3, y + 7), f"{density:.2f}", (0, 0, 0) if shade > 130 else ink, font)
    x, y = left, top + len(sites) * cell + 14
    for name, count in plan.orders_histogram().items():
        draw.rectangle((x, y, x + 12, y + 12), fill=ORDER_COLOURS[name])
        draw.text((x + 17, y), f"{name} {count}", ink, font)
        x += 75
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]


def kept_text(plan: Plan) -> str:
    """`30 % of blocks kept (41 % to 20 %)`: on average, and in the first and the last group of sparse steps."""
    kept = say("{density} of blocks kept", density=share(plan.density))
    return joined("", (kept, range_of([(density, 1) for density in plan.densities])))
