"""What scripts outside of the pack import keeps its place, wherever the code itself lies."""

from comfyui_paro.paro_runtime import plan_store, settings
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.store import PlanStore


def test_settings_and_plan_folder_are_where_scripts_look_for_them():
    assert settings.Settings is Settings and plan_store.PlanStore is PlanStore
