"""The pack loads whatever its folder is called, and from behind a link."""

import asyncio
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

PACK = Path(__file__).resolve().parent.parent.parent
NAMES = ("paro.attention-1.0", "PARO for ComfyUI", "paro-ätten-注意", "paro'attention", "1paro")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_folder(comfy, tmp_path, monkeypatch, name):
    """As the host loads it, and a call of the operator, which is known to torch by the pack's name."""
    pytest.importorskip("av", reason="NO av: the host's own nodes cannot be imported")
    import nodes

    folder = tmp_path / name
    folder.symlink_to(PACK, target_is_directory=True)
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", {})
    monkeypatch.setattr(nodes, "EXTENSION_WEB_DIRS", {})
    assert asyncio.run(nodes.load_custom_node(str(folder)))
    assert Path(nodes.EXTENSION_WEB_DIRS["paro-attention"]).samefile(PACK / "web")
    package = nodes.NODE_CLASS_MAPPINGS["PAROPatchModel"].__module__.rpartition(".nodes")[0]
    try:
        kernels = import_module(f"{package}.kernels.attention.api")
        geometry = kernels.Geometry(0, (2, 8, 8), 0, 64)
        precision = import_module(f"{package}.kernels.core.precision").PRECISIONS["16bit"]
        assert Path(kernels.__file__).resolve() == PACK / "kernels" / "attention" / "api.py"
        q = torch.randn(1, 1, 128, 64)
        tables = torch.arange(128, dtype=torch.int32)[None]
        rest = (None, None, None, 0, list(geometry.grid), 0, 64, 64, 1, precision.qk, precision.pv, False, None)
        out = kernels.attention_operator(q, q, q, tables, torch.zeros(1, dtype=torch.int32), *rest, "reference")
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q), atol=1e-3, rtol=1e-3)
    finally:
        for module in [each for each in sys.modules if each.startswith(package)]:
            del sys.modules[module]


def test_the_demos_model_is_in_no_list(comfy):
    """Or a workflow of somebody else's, whose model is not there, takes it where it stands first."""
    pytest.importorskip("av", reason="NO av: the host's own nodes cannot be imported")
    import folder_paths
    from comfyui_paro.nodes.demo import PARODemoModel
    from comfyui_paro.nodes.extension import PAROExtension
    from comfyui_paro.nodes.storage import DEMO_MODEL

    asyncio.run(PAROExtension().get_node_list())
    lists = {kind: folder_paths.get_filename_list(kind) for kind in list(folder_paths.folder_names_and_paths)}
    assert [kind for kind, names in lists.items() if any(name.endswith(DEMO_MODEL.name) for name in names)] == []
    (model,) = PARODemoModel.execute().result
    assert torch.isfinite(comfy.sample(model, (2, 8, 8), steps=1)).all()
