"""The pack as the host sees it: its list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..paro_runtime.compiling import ahead
from ..paro_runtime.host.language import follow_language
from ..paro_runtime.host.saved import keep_records
from .calibrate import PAROCalibrate
from .check.node import PAROCheck
from .compare.node import PAROCompare
from .demo import PARODemoConditioning, PARODemoDecode, PARODemoModel, PARODemoVAE
from .patch_model import PAROPatchModel
from .report import PAROReport
from .settings import PAROSettings
from .storage import register_folders


class PAROExtension(ComfyExtension):
    """What the host asks for when it starts."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Here and not in `on_load`, which older hosts do not call; the schemas need the folders.
        register_folders()
        ahead.at_start()
        keep_records()
        follow_language()
        demo = [PARODemoModel, PARODemoConditioning, PARODemoDecode, PARODemoVAE]
        return [PAROSettings, PAROPatchModel, PAROCalibrate, PAROReport, PAROCompare, PAROCheck, *demo]
