"""The large bed's state dict is a Wan 2.1 to the host: detected, loaded whole, and computing the same function."""

import importlib

import pytest
import torch
from comfyui_paro.bench.large_wan.model import new_model
from comfyui_paro.bench.large_wan.samples import start
from safetensors.torch import save_file

pytestmark = pytest.mark.host_on_cpu


def test_host_detects_wan21_text_to_video_and_agrees(comfy, tmp_path) -> None:
    torch.manual_seed(0)
    model = new_model().eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    save_file(model.state_dict(), tmp_path / "large.safetensors")
    load = importlib.import_module("comfy.sd").load_diffusion_model
    patcher = load(str(tmp_path / "large.safetensors"), model_options={"dtype": torch.float32})
    assert type(patcher.model.model_config).__name__ == "WAN21_T2V"
    host = patcher.model.diffusion_model
    assert host.state_dict().keys() == model.state_dict().keys()
    context, noise = start((1, 2), (3, 4, 5))
    t = torch.tensor([900.0, 120.0])
    with torch.no_grad():
        theirs = host(noise, t, context=context, transformer_options={})
        ours = model(noise, t, context)
    assert float(ours.std()) > 0.1
    assert float((theirs - ours).abs().max()) < 1e-4
