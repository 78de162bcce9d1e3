"""Calibrations that are under way: one file of sums per site, replaced whole after every observation.

Stopping at any moment loses at most one observation of one site. The files are not plans, carry another metadata key
and another suffix, and are never read as plans. What cannot be read is left out and observed again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...kernels.core.layout import TokenLayout
from ..plan.file import file_digest, write_whole
from ..plan.orders import ALL_ORDERS
from ..plan.plan import ModelIdentity, PlanError, Site
from .accumulator import SiteSums

log = logging.getLogger("paro")
KEY, DIGEST = "paro_partial", "paro_sha256"
FORMAT = 2
SUFFIX = ".sums"
DTYPES = (torch.float32, torch.bfloat16, torch.int64)


class PartialStore:
    """The folder of one calibration: model, options and grid are those of its first file."""

    def __init__(self, folder: Path, identity: ModelIdentity, options: dict) -> None:
        self.folder = Path(folder)
        self.identity = asdict(identity)
        self.options = options

    def write(self, site: Site, sums: SiteSums, layout: TokenLayout) -> None:
        """Replace the site's file; a reader sees the old one or the new one."""
        header = {
            "format": FORMAT,
            "identity": self.identity,
            "options": self.options,
            "layout": [layout.prefix, list(layout.grid), layout.suffix],
            "site": site.name,
            "candidates": list(sums.candidates),
            "done": sorted(sums.done),
        }
        text, tensors = json.dumps(header), {k: v.contiguous() for k, v in sums.tensors().items()}
        path = self.folder / f"{site.name}{SUFFIX}"
        write_whole(path, tensors, {KEY: text, DIGEST: file_digest(text, tensors)})

    def read(self) -> tuple[TokenLayout | None, dict[Site, SiteSums]]:
        """What the folder holds. Raises PlanError if it belongs to another calibration."""
        layout, found = None, {}
        for path in sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder.is_dir() else []:
            try:
                site, its_layout, sums = self._read_one(path)
            except PlanError:
                raise
            except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                log.warning(
                    "calibration: %s cannot be read (%s), it is observed again", path.name, type(error).__name__
                )
                continue
            if layout is not None and its_layout != layout:
                raise PlanError(
                    f"calibration {self.folder.name}: mixes {layout.describe()} and {its_layout.describe()}"
                )
            layout = its_layout
            found[site] = sums
        return layout, found

    def _read_one(self, path: Path) -> tuple[Site, TokenLayout, SiteSums]:
        with safe_open(path, framework="pt") as file:
            text, digest = (file.metadata()[key] for key in (KEY, DIGEST))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if digest != file_digest(text, tensors):
            raise ValueError("its checksum does not match")
        header = json.loads(text)
        if header["format"] != FORMAT or header["identity"] != self.identity or header["options"] != self.options:
            raise PlanError(f"calibration {self.folder.name}: belongs to another model or to other options; remove it")
        prefix, grid, suffix = header["layout"]
        layout = TokenLayout(prefix, tuple(grid), suffix)
        candidates = tuple(header["candidates"])
        sums = SiteSums(candidates, done={(int(p), int(s)) for p, s in header["done"]}, **tensors)
        heads = sums.choice.shape[0]
        right = (
            set(candidates) <= set(ALL_ORDERS)
            and sums.scores.shape == (heads, len(candidates))
            and 0 <= int(sums.choice.min()) <= int(sums.choice.max()) < len(candidates)
            and int(sums.weight.min()) > 0
            and all(t.shape[0] == heads and t.dtype in DTYPES for t in tensors.values())
            and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
            and (sums.error is None or sums.error[:, : sums.mass.shape[1]].shape == sums.mass.shape)
        )
        if not right:
            raise ValueError("its sums do not fit together")
        return Site.parse(header["site"]), layout, sums

    def remove(self) -> None:
        """Delete the folder, and the one around it if it held nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()
