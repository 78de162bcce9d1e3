"""Where plans live: a writable folder of the user's, and read-only ones such as the pack's own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...kernels.core.layout import TokenLayout
from .file import load_plan, read_header, save_plan
from .options import MaskOptions
from .plan import ModelIdentity, Plan, PlanError

log = logging.getLogger("paro")
SUFFIX = ".safetensors"
# In bytes: most file systems take 255, the suffix and a temporary one included.
LONGEST_NAME = 200
# Windows gives these to devices, whatever comes behind a dot.
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in "123456789¹²³")}


class PlanStore:
    """Plans by name. A name is a file name without folders; it never leads out of the store's folders."""

    def __init__(self, folders: Sequence[Path], writable: Path) -> None:
        self.writable = Path(writable)
        self.folders = [self.writable, *(Path(f) for f in folders if Path(f) != self.writable)]

    def names(self) -> list[str]:
        """File names of every plan, the user's first; of equal names the user's counts. A folder that may not be read
        has none."""
        found: dict[str, None] = {}
        for folder in self.folders:
            try:
                entries = sorted(entry.name for entry in os.scandir(folder) if _is_file(entry))
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("PARO: no plans from %s (%s)", folder, error.strerror or error)
                continue
            found |= dict.fromkeys(name for name in entries if name.endswith(SUFFIX))
        return list(found)

    def _path(self, name: str) -> Path:
        """Where a name is, or would be written. Raises PlanError for what is not a plain name, OSError where a folder
        may not be looked into."""
        if not isinstance(name, str) or not name or name in (".", "..") or any(c in name for c in '/\\:\0*?"<>|'):
            raise PlanError(f"plan: {name!r} is not a plain file name")
        if len(name.encode(errors="surrogatepass")) > LONGEST_NAME:
            raise PlanError(f"plan: a name of at most {LONGEST_NAME} bytes is possible, {name[:40]!r}… is longer")
        name = name if name.endswith(SUFFIX) else name + SUFFIX
        for folder in self.folders:
            if (folder / name).is_file():
                return folder / name
        return self.writable / name

    def locate(self, name: str) -> Path | None:
        """The file of a name, or None if there is none. Raises PlanError for what is not a plain name, and where the
        folder may not be looked into."""
        try:
            path = self._path(name)
            return path if path.is_file() else None
        except OSError as error:
            raise PlanError(f"plan: {self.writable} cannot be read ({error.strerror or error})") from None

    def path_to_write(self, name: str) -> Path:
        """Where a plan of this name is written. Raises PlanError for what no file of every system can be called."""
        try:
            path = self.writable / self._path(name).name
        except OSError as error:
            raise PlanError(f"plan: {self.writable} cannot be read ({error.strerror or error})") from None
        if not name.isprintable() or name.partition(".")[0].rstrip().lower() in DEVICES:
            raise PlanError(f"plan: {name!r} cannot be the name of a file on every system")
        return path

    def load(self, name: str) -> Plan:
        """Read a plan. Raises PlanError."""
        return load_plan(self._path(name))

    def save(self, plan: Plan, name: str | None = None) -> Path:
        """Write a plan to the user's folder, under its automatic name by default; returns the path."""
        path = self.path_to_write(name or automatic_name(plan))
        save_plan(plan, path)
        return path

    def save_beside(self, plan: Plan, told: Callable[[str], None]) -> threading.Thread:
        """Write a plan in a thread of its own, which is returned; `told` hears in one line what went wrong."""

        def save() -> None:
            try:
                # Tensors that were made under inference mode are read under it.
                with torch.inference_mode():
                    self.save(plan)
            except Exception as error:  # a full or read-only disk, say, must not end the run
                told(f"plan: could not be saved ({str(error)[:200] or type(error).__name__})")

        thread = threading.Thread(target=save, name="paro-save")
        thread.start()
        return thread

    def find(
        self, identity: ModelIdentity, layout: TokenLayout, block_q: int, options: MaskOptions
    ) -> tuple[FoundPlan | None, str | None]:
        """The plan saved earlier for this model, grid and options; else None and, if one was refused, why. Only what
        the file says about itself has been read by then."""
        name = _automatic_name(identity, layout, block_q, options.as_dict())
        try:
            path = self.locate(name)
            if path is None:
                return None, None
            header = read_header(path)
        except PlanError as error:
            return None, str(error)
        except OSError as error:
            return None, f"plan {name}: cannot be read ({error.strerror or error})"
        reason = header.unsuitable(identity, layout)
        # A file may have been given another one's name.
        if reason is None and (header.settings, header.block_q) != (options.as_dict(), block_q):
            reason = f"plan {name}: was made with other settings than its name says"
        return (None, reason) if reason else (FoundPlan(path, header), None)


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to where nobody may look
        return False


class FoundPlan:
    """A plan whose file is known to suit. Its orders and masks are read in a thread of their own, once that is asked
    for."""

    def __init__(self, path: Path, header: Plan) -> None:
        """header: the plan without its sites, as `plan_file.read_header` gives it."""
        self.header = header
        self._path = path
        self._plan: Plan | None = None
        self._reason: Exception | None = None
        self._thread = threading.Thread(target=self._read, name="paro-plan", daemon=True)

    def begin_reading(self) -> FoundPlan:
        """Start reading; once."""
        self._thread.start()
        return self

    def _read(self) -> None:
        try:
            plan = load_plan(self._path)
            if (plan.identity, plan.layout) != (self.header.identity, self.header.layout):
                raise PlanError(f"plan {self._path.name}: was replaced while it was being read")
            self._plan = plan
        except Exception as error:  # told to whoever asks for the plan
            self._reason = error

    def plan(self) -> Plan:
        """The whole plan, as soon as it is read, which must have begun. Raises PlanError, or whatever else kept it from
        being read."""
        self._thread.join()
        if self._plan is None:
            raise self._reason
        return self._plan


def automatic_name(plan: Plan) -> str:
    """File name under which `PlanStore.find` looks for such a plan."""
    return _automatic_name(plan.identity, plan.layout, plan.block_q, plan.settings)


def _automatic_name(identity: ModelIdentity, layout: TokenLayout, block_q: int, options: dict) -> str:
    text = json.dumps([options, block_q], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    grid = "x".join(map(str, layout.grid))
    return f"auto-{identity.family}-{identity.architecture[:8]}-{identity.weights[:8]}-{grid}-{digest}{SUFFIX}"
