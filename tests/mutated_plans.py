"""Plan files that were damaged, or made to deceive: for tests and for scripts/fuzz.py."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import replace

import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.plan.options import MaskOptions
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Plan, Site, SitePlan

IDENTITY = ModelIdentity("wan", "a" * 16, "b" * 16)
LAYOUT = TokenLayout(3, (4, 8, 10), 2)
OPTIONS = MaskOptions(0.3, "mass", "shared", 64)


def make_plan(groups: int = 3) -> Plan:
    generator = torch.Generator().manual_seed(0)
    sites = {}
    for index in range(3):
        found = []
        for _ in range(groups):
            mask = torch.rand(4, 5, 5, generator=generator) < 0.3
            mask[:, :, 0] = True
            orders, bias = ("FHW", "HWF", "4x4x4", "WFH"), torch.randn(4, generator=generator)
            kept = torch.rand(4, generator=generator)
            found.append(SitePlan.create(orders, mask, bias, kept, index == 1))
        sites[Site("double", index)] = SitePlan.joined(found)
    return Plan(IDENTITY, LAYOUT, 64, sites, 64, OPTIONS.as_dict(), {"by": "test", "note": "x" * 40})


def same(a: Plan, b: Plan) -> bool:
    return (
        (a.identity, a.layout, a.block_q, a.pool, a.settings, a.made)
        == (b.identity, b.layout, b.block_q, b.pool, b.settings, b.made)
        and a.sites.keys() == b.sites.keys()
        and all(
            (x.orders, x.rotate) == (y.orders, y.rotate)
            and torch.equal(x.packed, y.packed)
            and torch.equal(x.tail_bias, y.tail_bias)
            and torch.equal(x.density, y.density)
            and torch.equal(x.mass_kept, y.mass_kept)
            for x, y in zip(a.sites.values(), b.sites.values(), strict=True)
        )
    )


def without_masks(plan: Plan) -> Plan:
    """As plans of large grids are: runs measure their masks themselves."""
    bare = {site: replace(e, packed=torch.empty(e.groups, 0, dtype=torch.uint8)) for site, e in plan.sites.items()}
    return replace(plan, sites=bare)


HOSTILE = (None, True, -1, 0, 1 << 62, 1e308, "", "../../x", [], {}, [[]], "FHW", [1 << 40] * 3, "9" * 3000)


def mutate(data: bytes, random: random.Random) -> bytes:
    """Damage of one kind: cut, flipped, overwritten, moved, doubled, tensors swapped, or a header that lies."""
    kind = random.randrange(9)
    at = random.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + random.randbytes(random.randrange(1, 64)) + data[at:]
    if kind == 3:
        return struct.pack("<Q", random.choice((0, 1, 1 << 20, 1 << 40, (1 << 64) - 1))) + data[8:]
    if kind == 4:
        return data[:at] + data
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if kind == 8:
        one, other = random.sample(sorted(header.keys() - {"__metadata__"}), 2)
        header[one], header[other] = header[other], header[one]
    elif kind == 5:  # the file's own header
        name = random.choice(sorted(header))
        field = random.choice(("dtype", "shape", "data_offsets"))
        header[name] = {**header[name], field: random.choice(HOSTILE)}
    else:  # what the plan declares
        declared = json.loads(header["__metadata__"]["paro"])
        field = random.choice(sorted(declared))
        if kind == 6 or not isinstance(declared[field], (list, dict)) or not declared[field]:
            declared[field] = random.choice(HOSTILE)
        elif isinstance(declared[field], list):
            declared[field][random.randrange(len(declared[field]))] = random.choice(HOSTILE)
        else:
            declared[field][random.choice(sorted(declared[field]))] = random.choice(HOSTILE)
        header["__metadata__"]["paro"] = json.dumps(declared)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]
