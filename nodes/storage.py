"""Where the pack's files live in a ComfyUI installation."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..paro_runtime.plan.store import SUFFIX, PlanStore

FOLDER = "paro"
PACK = Path(__file__).resolve().parent.parent
DEMO_MODEL = PACK / "tests" / "tiny_wan" / "paro-tiny-wan.safetensors"


def register_folders() -> None:
    """Tell ComfyUI about `models/paro` (users may map it elsewhere) and about the folder of the demo model."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    # The host creates the entry without extensions, which would list every file.
    folder_paths.folder_names_and_paths[FOLDER][1].add(SUFFIX)
    if DEMO_MODEL.is_file():
        folder_paths.add_model_folder_path("diffusion_models", str(DEMO_MODEL.parent))


def plan_store() -> PlanStore:
    """Plans of this installation; new ones go to the first folder that ComfyUI knows."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    return PlanStore(folders, folders[0])
