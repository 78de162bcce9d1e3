"""A stand-in for Qwen-Image 2.1, whose host version was not at hand: its call forms as read, and nothing else of it.

Block-causal: each piece of text attends to what lies before and within it, references and the image to everything up to
their own end. Imports comfy: after boot.
"""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.modules.attention import optimized_attention

from .tiny_families import fill

HEADS = 2


class QwenImage21Transformer2DModel(torch.nn.Module):
    """Two blocks of attention over text, references and image."""

    def __init__(self, width: int = 256, device=None, operations=None, dtype=None, **_: Any) -> None:
        super().__init__()
        self.dtype = dtype
        self.patch_size = 1
        self.txt_in = torch.nn.Linear(64, width)
        self.img_in = torch.nn.Linear(16, width)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(2))
        self.out = torch.nn.Linear(width, 16)

    def forward(self, x, timesteps, context, ref_latents=None, transformer_options=None, **_: Any) -> torch.Tensor:
        pieces = [self.txt_in(context)]
        pieces += [self.img_in(image.flatten(2).transpose(1, 2)) for image in (*(ref_latents or ()), x)]
        hidden = torch.cat(pieces, 1)
        ends = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0).tolist()
        causal = torch.ones(ends[0], ends[0], dtype=torch.bool).tril()
        transformer_options = {**transformer_options, "block_type": "single", "total_blocks": len(self.blocks)}
        for index, block in enumerate(self.blocks):
            transformer_options["block_index"] = index
            q, k, v = block(hidden).chunk(3, -1)
            outs = [
                optimized_attention(
                    q[:, start:end],
                    k[:, :end],
                    v[:, :end],
                    HEADS,
                    mask=None if start else causal,
                    transformer_options=transformer_options,
                )
                for start, end in zip([0, *ends], ends, strict=False)
            ]
            hidden = hidden + torch.cat(outs, 1)
        return self.out(hidden[:, ends[-2] :]).transpose(1, 2).reshape(x.shape)


QwenImage21Transformer2DModel.__module__ = "comfy.ldm.qwen_image21.model"


def build() -> Any:
    """A model patcher over the stand-in, in a base model of the host that hands on reference latents."""
    config = comfy.supported_models.Flux({"image_model": "flux", "in_channels": 16, "out_channels": 16})
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = None
    model = comfy.model_base.Flux(config, device="cpu", unet_model=QwenImage21Transformer2DModel)
    fill(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
