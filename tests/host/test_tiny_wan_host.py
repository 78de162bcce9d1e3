"""The committed tiny model is a Wan 2.1 to the host: detected, loaded whole, and computing the same function."""

import importlib

import pytest
import torch
from comfyui_paro.tests.tiny_wan import data
from comfyui_paro.tests.tiny_wan.model import load_tiny_wan
from comfyui_paro.tests.tiny_wan.sampler import seeded_noise

pytestmark = pytest.mark.host_on_cpu


@pytest.fixture(scope="module")
def patcher(comfy):
    """The committed file through the host's own diffusion model loader, computing in fp32."""
    path = data.__file__.replace("data.py", "paro-tiny-wan.safetensors")
    return importlib.import_module("comfy.sd").load_diffusion_model(path, model_options={"dtype": torch.float32})


def test_host_detects_wan21_text_to_video_and_takes_every_key(patcher) -> None:
    assert type(patcher.model.model_config).__name__ == "WAN21_T2V"
    ours = load_tiny_wan().state_dict()
    theirs = patcher.model.diffusion_model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key].float(), ours[key]) for key in ours)


@pytest.mark.parametrize("size", [(4, 8, 10), (3, 7, 9), (8, 16, 16)], ids=str)
def test_forward_agrees_with_the_hosts_module(patcher, size: tuple[int, int, int]) -> None:
    host = patcher.model.diffusion_model
    x, t = seeded_noise((2, 16, *size), 4), torch.tensor([900.0, 120.0])
    context = data.contexts(torch.tensor([[0, 1, 2], [3, 2, 1]]))
    with torch.no_grad():
        theirs = host(x, t, context=context, transformer_options={})
    difference = float((theirs - load_tiny_wan()(x, t, context)).abs().max())
    print(f"forward difference to the host at {size}: {difference:.2e}")
    assert difference < 2e-5


def test_latent_format_is_the_one_undone_here(patcher) -> None:
    latent = seeded_noise((1, 16, 2, 4, 4), 0)
    handed_out = patcher.model.latent_format.process_out(latent)
    torch.testing.assert_close(handed_out, data.to_host_latent(latent), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(data.from_host_latent(handed_out), latent, atol=1e-5, rtol=0)
