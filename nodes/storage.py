"""Where the pack's files live in a ComfyUI installation."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakValueDictionary

import folder_paths

from ..paro_runtime.plan.plan import Plan, PlanError
from ..paro_runtime.plan.store import SUFFIX, PlanStore

FOLDER = "paro"
PACK = Path(__file__).resolve().parent.parent
DEMO_MODEL = PACK / "tests" / "tiny_wan" / "paro-tiny-wan.safetensors"


def register_folders() -> None:
    """Tell ComfyUI about `models/paro`, which users may map elsewhere."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    # The host creates the entry without extensions, which would list every file.
    folder_paths.folder_names_and_paths[FOLDER][1].add(SUFFIX)


def plan_store() -> PlanStore:
    """Plans of this installation; new ones go to the first folder that ComfyUI knows."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    return PlanStore(folders, folders[0])


_read: WeakValueDictionary[tuple, Plan] = WeakValueDictionary()
_checked: list[Plan] = []
"""The plan that was read last to check it, for the run that comes next."""


def read_plan(name: str, *, to_check: bool) -> Plan | None:
    """The plan of this name, None where there is no such file. A file is read once, for the check of a prompt and for
    its run, as long as it stays what it was. Raises PlanError.

    to_check: keep it for the run; that lets it go.
    """
    store = plan_store()
    path = store.locate(name)
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError as error:
        raise PlanError(f"plan {name}: cannot be read ({error.strerror or error})") from None
    key = (path, found.st_ino, found.st_size, found.st_mtime_ns)
    plan = _read.get(key)
    if plan is None:
        plan = _read[key] = store.load(name)
    _checked[:] = [plan] if to_check else []
    return plan
