"""Plan files, safe to read from a stranger.

A plan file is a safetensors file. Its metadata key `paro` holds JSON that declares every shape; every tensor is checked
against the declaration before it is read, so a wrong file costs one line and little memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...kernels.core.block_mask import count_bits, words_of_rows
from ...kernels.core.layout import BLOCK_K, BLOCK_Q_CHOICES, TokenLayout
from ...kernels.core.pattern import MOST_EXPANSIONS
from .orders import ALL_ORDERS
from .plan import ModelIdentity, Plan, PlanError, Site, SitePlan

FORMAT = 4
# Heads whose masks are looked at together when a file is checked.
HEADS_AT_ONCE = 8
# Files may hold a byte for each of so many distances, and each block of keys, of every head: nothing uses them.
MOST_DISTANCES = 20**3
LIMITS = {
    "metadata_bytes": 4 << 20,
    "sites": 4096,
    "heads": 1024,
    "groups": 8,
    "grid_tokens": 1 << 24,
    "mask_bytes": 3 << 30,  # three masks of 40 layers of 40 heads at 200,000 tokens
}


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan; the file appears whole or not at all."""
    tensors, sites = {}, []
    for number, (site, entry) in enumerate(sorted(plan.sites.items())):
        key = f"{number:04d}"
        optional = {"tail": entry.tail_bias is not None, "mask": entry.has_masks}
        sites.append({"name": site.name, "shape": list(entry.shape), **optional, "rotate": entry.rotate})
        tensors[f"{key}.orders"] = torch.tensor([ALL_ORDERS.index(name) for name in entry.orders], dtype=torch.uint8)
        if entry.has_masks:
            tensors[f"{key}.mask"] = entry.packed
        tensors[f"{key}.density"] = entry.density
        tensors[f"{key}.mass_kept"] = entry.mass_kept
        if entry.tail_bias is not None:
            tensors[f"{key}.tail_bias"] = entry.tail_bias
    header = {
        "format": FORMAT,
        "identity": asdict(plan.identity),
        "layout": [plan.layout.prefix, list(plan.layout.grid), plan.layout.suffix],
        "block_q": plan.block_q,
        "block_k": BLOCK_K,
        "pool": plan.pool,
        "expansions": plan.expansions,
        "groups": plan.groups,
        "order_names": ALL_ORDERS,
        "sites": sites,
        "settings": plan.settings,
        "made": plan.made,
    }
    text = json.dumps(header)
    write_whole(path, tensors, {"paro": text, "paro_sha256": file_digest(text, tensors)})


def write_whole(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that appears whole or not at all, also where others write the same one at that time.
    Makes the folder. Raises OSError or SafetensorError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `tempfile`: its files may be read by nobody else, and plans lie in folders that are shared.
    partial = path.with_name(f"{path.name}.{os.getpid():x}-{threading.get_ident():x}.part")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def file_digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the header and every tensor: a flipped bit in a mask is a plan nobody made."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def load_plan(path: Path) -> Plan:
    """Read and check a plan file. Raises PlanError with one line on anything unexpected."""
    return _opened(path, _read)


def read_header(path: Path) -> Plan:
    """What a plan file says about itself, as a plan without sites; nothing is known about its tensors yet. Raises
    PlanError as `load_plan` does."""
    return _opened(path, lambda file, name: _Header.read(file, name).plan({}))


def _opened(path: Path, read: Callable[..., Plan]) -> Plan:
    name = Path(path).name
    try:
        with safe_open(path, framework="pt") as file:
            return read(file, name)
    except FileNotFoundError:
        reason = "no such file"
    except PlanError as error:
        reason = str(error).removeprefix(f"plan {name}: ")
    except (SafetensorError, OSError) as error:
        reason = f"not a complete safetensors file ({error})"
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"damaged header ({type(error).__name__}: {error})"
    # One line, and no longer than a line: reasons quote the file, and the file may be hostile.
    reason = " ".join(reason.split())
    raise PlanError(f"plan {name}: {reason if len(reason) <= 240 else reason[:237] + '...'}")


@dataclass(frozen=True)
class _Header:
    """What a file declares, checked as far as it can be without its tensors. text: its JSON, and content: that parsed;
    blocks: of a mask, (q_blocks, k_blocks)."""

    text: str
    content: dict
    layout: TokenLayout
    blocks: tuple[int, int]

    @classmethod
    def read(cls, file, name: str) -> _Header:
        text = (file.metadata() or {}).get("paro")
        if text is None:
            raise PlanError(f"plan {name}: a safetensors file, but not a PARO plan")
        if len(text) > LIMITS["metadata_bytes"]:
            raise PlanError(f"plan {name}: header of {len(text)} bytes, at most {LIMITS['metadata_bytes']} are read")
        header = json.loads(text)
        if header["format"] != FORMAT:
            raise PlanError(f"plan {name}: format {header['format']!r}, this version reads {FORMAT}")
        prefix, grid, suffix = header["layout"]
        groups = header["groups"]
        numbers = [
            prefix,
            suffix,
            *grid,
            header["block_q"],
            header["block_k"],
            header["pool"],
            header["expansions"],
            groups,
        ]
        if not all(type(n) is int for n in numbers):
            raise PlanError(f"plan {name}: the layout's numbers must be whole, found {numbers}")
        if not 0 < groups <= LIMITS["groups"]:
            raise PlanError(f"plan {name}: {groups} groups of steps, expected 1 to {LIMITS['groups']}")
        layout = TokenLayout(prefix, tuple(grid), suffix)
        if layout.length > LIMITS["grid_tokens"]:
            raise PlanError(f"plan {name}: {layout.length} tokens, at most {LIMITS['grid_tokens']} are read")
        block_q, block_k, pool, expansions = (header[key] for key in ("block_q", "block_k", "pool", "expansions"))
        if block_q not in BLOCK_Q_CHOICES or block_k != BLOCK_K or pool < 1 or BLOCK_K % pool:
            raise PlanError(f"plan {name}: blocks of {block_q} x {block_k} and pools of {pool} are not supported")
        if not 0 <= expansions <= MOST_EXPANSIONS:
            raise PlanError(f"plan {name}: {expansions} expansions of pools, expected 0 to {MOST_EXPANSIONS}")
        names = header["order_names"]
        if not isinstance(names, list) or any(order not in ALL_ORDERS for order in names):
            raise PlanError(f"plan {name}: order names {names!r} are not all known")
        target = header["settings"].get("mass_target", 0)
        if type(target) not in (int, float) or not 0 <= target <= 1:
            raise PlanError(f"plan {name}: a mass_target of {target!r} is no share of the attention")
        if not 0 < len(header["sites"]) <= LIMITS["sites"]:
            raise PlanError(f"plan {name}: {len(header['sites'])} sites, expected 1 to {LIMITS['sites']}")
        made = cls(text, header, layout, (-(-layout.grid_tokens // block_q), -(-layout.grid_tokens // BLOCK_K)))
        made._check_sites(name)
        return made

    def _check_sites(self, name: str) -> None:
        budget, blocks = LIMITS["mask_bytes"], self.blocks
        for entry in self.content["sites"]:
            heads, *found = entry["shape"]
            if type(heads) is not int or not 0 < heads <= LIMITS["heads"] or tuple(found) != blocks:
                raise PlanError(
                    f"plan {name}: mask of {entry['name']!r} is {entry['shape']}, expected heads x {blocks}"
                )
            # Each is absent from plans of some version.
            for key, default in (("rotate", False), ("mask", True), ("falloff", False)):
                value = entry.get(key, default)
                if type(value) is not bool:
                    raise PlanError(f"plan {name}: {key} of {entry['name']!r} is {value!r}, expected true or false")
            masks = self.content["groups"] * math.prod(blocks) // 8 if entry.get("mask", True) else 0
            budget -= heads * (masks + self.falloff_width(entry))
            if budget < 0:
                raise PlanError(f"plan {name}: masks over {LIMITS['mask_bytes']} bytes")

    def falloff_width(self, entry: dict) -> int:
        """Bytes per head that a site's falloff may have, 0 without one."""
        return MOST_DISTANCES + self.blocks[1] if entry.get("falloff", False) else 0

    def plan(self, sites: dict[Site, SitePlan]) -> Plan:
        """The plan with these sites."""
        header = self.content
        identity = ModelIdentity(**{key: str(value) for key, value in header["identity"].items()})
        rest = (header["pool"], dict(header["settings"]), dict(header["made"]), header["expansions"])
        return Plan(identity, self.layout, header["block_q"], sites, *rest)


def _read(file, name: str) -> Plan:
    header = _Header.read(file, name)
    groups, names = header.content["groups"], header.content["order_names"]
    sites: dict[Site, SitePlan] = {}
    tensors: dict[str, torch.Tensor] = {}
    for number, entry in enumerate(header.content["sites"]):
        key, shape = f"{number:04d}", (entry["shape"][0], *header.blocks)
        parts = (entry["tail"], header.falloff_width(entry), entry.get("mask", True))
        found = _read_site(file, name, key, groups, shape, names, *parts)
        tensors |= {f"{key}.{part}": tensor for part, tensor in found.items()}
        sites[Site.parse(entry["name"])] = _site_plan(found, shape, names, entry.get("rotate", False))
    if len(sites) != len(header.content["sites"]):
        raise PlanError(f"plan {name}: a site is named twice")
    if set(file.keys()) != set(tensors):
        raise PlanError(f"plan {name}: {len(file.keys())} tensors, {len(tensors)} are declared")
    if file.metadata().get("paro_sha256") != file_digest(header.text, tensors):
        raise PlanError(f"plan {name}: damaged, its checksum does not match")
    return header.plan(sites)


def _read_site(
    file,
    name: str,
    key: str,
    groups: int,
    shape: tuple[int, int, int],
    names: list[str],
    tail: bool,
    width: int,
    masks: bool,
) -> dict:
    heads = shape[0]
    expected = {
        "orders": ("U8", [heads]),
        "density": ("F32", [groups, heads]),
        "mass_kept": ("F32", [groups, heads]),
    }
    if masks:
        expected["mask"] = ("U8", [groups, -(-math.prod(shape) // 8)])
    if tail:
        expected["tail_bias"] = ("F32", [groups, heads])
    if width:
        found = file.get_slice(f"{key}.falloff").get_shape()
        expected["falloff"] = ("U8", [heads, min([*found[-1:], width])])
    tensors = {}
    for part, (dtype, size) in expected.items():
        view = file.get_slice(f"{key}.{part}")
        if view.get_dtype() != dtype or view.get_shape() != size:
            raise PlanError(
                f"plan {name}: {key}.{part} is {view.get_dtype()} {view.get_shape()}, expected {dtype} {size}"
            )
        tensors[part] = file.get_tensor(f"{key}.{part}")
    if int(tensors["orders"].max()) >= len(names):
        raise PlanError(
            f"plan {name}: {key}.orders holds {int(tensors['orders'].max())}, there are {len(names)} orders"
        )
    for part in ("density", "mass_kept", "tail_bias"):
        if part in tensors and not tensors[part].isfinite().all():
            raise PlanError(f"plan {name}: {key}.{part} holds a value that is not finite")
    if not 0 < tensors["density"].min() <= tensors["density"].max() <= 1:
        raise PlanError(f"plan {name}: {key}.density is no share of the blocks")
    for packed, density in zip(tensors["mask"] if masks else (), tensors["density"] if masks else (), strict=True):
        kept, least = _kept_blocks(packed, shape)
        if not least:
            raise PlanError(f"plan {name}: {key}.mask has a row that keeps no block")
        if (kept / math.prod(shape[1:]) - density).abs().max() > 1e-3:
            raise PlanError(f"plan {name}: {key}.mask does not have the density it declares")
    if not -1e-3 <= tensors["mass_kept"].min() <= tensors["mass_kept"].max() <= 1 + 1e-3:
        raise PlanError(f"plan {name}: {key}.mass_kept is no share of the attention")
    if tail and tensors["tail_bias"].abs().max() > 20:
        raise PlanError(f"plan {name}: {key}.tail_bias is beyond 20")
    return tensors


def _kept_blocks(packed: torch.Tensor, shape: tuple[int, int, int]) -> tuple[torch.Tensor, int]:
    """Kept blocks of each head, int64 `[heads]`, and of the row that keeps fewest. Takes a few times the memory of the
    bits of HEADS_AT_ONCE heads, which begin at a whole byte each time."""
    heads, parts = shape[0], []
    for first in range(0, heads, HEADS_AT_ONCE):
        some = min(HEADS_AT_ONCE, heads - first)
        start, stop = (number * math.prod(shape[1:]) for number in (first, first + some))
        words = words_of_rows(packed[start // 8 : -(-stop // 8)], (some, *shape[1:]))
        parts.append(count_bits(words).sum(2))
    counts = torch.cat(parts)
    return counts.sum(1), int(counts.min())


def _site_plan(tensors: dict[str, torch.Tensor], shape: tuple[int, int, int], names: list[str], rotate) -> SitePlan:
    orders = tuple(names[i] for i in tensors["orders"].tolist())
    rest = (tensors.get("tail_bias"), tensors["density"], tensors["mass_kept"], rotate)
    masks = tensors.get("mask", torch.empty(len(tensors["density"]), 0, dtype=torch.uint8))
    return SitePlan(orders, masks, shape, *rest)
