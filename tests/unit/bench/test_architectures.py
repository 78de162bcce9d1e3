"""The bench's architectures: what attention sees is the joint sequence, in the order that the layout says."""

import pytest
import torch
from comfyui_paro.bench.architectures import GRIDS, MODELS, JointConfig, layout_of, random_model, step_of

SMALL = {
    "text first": JointConfig(dim=128, double=2, single=1, text_tokens=5, text_first=True, head_dim=64),
    "text last": JointConfig(dim=128, double=2, single=0, text_tokens=5, text_first=False, head_dim=64),
}


def run(config, attention):
    torch.manual_seed(0)
    model = random_model("", device="cpu", dtype=torch.float32, config=config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        return step_of(model, (2, 3, 4))(attention)


@pytest.mark.parametrize("name", SMALL)
def test_attention_sees_text_and_image_where_the_layout_says(name):
    config, seen = SMALL[name], []

    def attention(q, k, v, *, layer):
        seen.append((layer, tuple(q.shape)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    out = run(config, attention)
    assert out.shape == (1, 24, 128) and out.isfinite().all()
    assert seen == [(i, (1, 2, 29, 64)) for i in range(config.layers)]

    def deaf_to_text(q, k, v, *, layer):
        image = slice(5, None) if config.text_first else slice(0, 24)
        return torch.nn.functional.scaled_dot_product_attention(q, k[:, :, image], v[:, :, image])

    assert not torch.allclose(run(config, deaf_to_text), out, atol=1e-4)


def test_layouts_are_those_of_the_models():
    assert layout_of("flux", GRIDS["flux"]["1024"]).length == 4608
    assert layout_of("flux", GRIDS["flux"]["1024"]).prefix == MODELS["flux"].text_tokens == 512
    assert layout_of("hunyuan15", GRIDS["hunyuan15"]["720p"]).length == 111856
    assert layout_of("wan14b", GRIDS["wan14b"]["720p"]).length == 75600
    # Parameters of the published transformers: Flux 1 has 11.9 billion, HunyuanVideo 1.5 8.3 billion.
    for name, billions in (("flux", 11.9), ("hunyuan15", 8.3)):
        with torch.device("meta"):
            from comfyui_paro.bench.architectures import JointTransformer

            count = sum(p.numel() for p in JointTransformer(MODELS[name]).parameters())
        assert abs(count / 1e9 - billions) < 0.25 * billions
