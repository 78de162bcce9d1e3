"""Published sizes of the architectures, built without memory: recognised, laid out, and as many tokens as known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_paro.paro_runtime.host.families import ModelCall, family_of

_WAN = {"image_model": "wan2.1", "dim": 5120, "ffn_dim": 13824, "num_layers": 40, "num_heads": 40, "in_dim": 16}
_WAN |= {"model_type": "t2v", "out_dim": 16}
_WAN_5B = _WAN | {"dim": 3072, "ffn_dim": 14336, "num_layers": 30, "num_heads": 24, "in_dim": 48, "out_dim": 48}
_H3 = SimpleNamespace(segments=[(0, 700, "text"), (700, 700 + 31 * 24 * 42, "video")])
_HV15 = {"image_model": "hunyuan_video", "in_channels": 65, "out_channels": 32, "vec_in_dim": None, "depth": 54}
_HV15 |= {"context_in_dim": 3584, "hidden_size": 2048, "mlp_ratio": 4.0, "num_heads": 16, "depth_single_blocks": 0}
_HV15 |= {"axes_dim": [16, 56, 56], "theta": 256, "patch_size": [1, 1, 1], "qkv_bias": True, "guidance_embed": False}
_HV15 |= {"byt5": True, "meanflow": False, "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True}
_ZIMAGE = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560}
_ZIMAGE |= {"n_layers": 30, "qk_norm": True, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30}
_ZIMAGE |= {"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "ffn_dim_multiplier": 8 / 3, "time_scale": 1000.0}
_ZIMAGE |= {"z_image_modulation": True, "pad_tokens_multiple": 32, "rope_theta": 256.0}
_FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096}
_FLUX |= {"hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38}
_FLUX |= {"axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True}
_SD35M = {"in_channels": 16, "patch_size": 2, "depth": 24, "num_blocks": 24, "qk_norm": "rms", "adm_in_channels": 2048}
_SD35M |= {"x_block_self_attn_layers": list(range(13)), "pos_embed_max_size": 384, "num_patches": 147456}
_SD35M |= {"input_size": None, "pos_embed_scaling_factor": None}
_SD35M["context_embedder_config"] = {
    "target": "torch.nn.Linear",
    "params": {"in_features": 4096, "out_features": 1536},
}
_SDXL = {"use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True, "legacy": False}
_SDXL |= {"num_classes": "sequential", "adm_in_channels": 2816, "in_channels": 4, "model_channels": 320}
_SDXL |= {"num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4]}
_SDXL |= {"transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
_SDXL |= {"use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64}
_COG = {"image_model": "cogvideox", "num_attention_heads": 48, "num_layers": 42}
_COG |= {"use_rotary_positional_embeddings": True}


def _packed(video: tuple, audio: tuple, **extra) -> dict:
    return {"latent_shapes": [video, audio], **extra}


# The host's config class, its values, the call, the layouts, and calls per stream where they are counted.
MODELS = [
    ("WAN21_T2V", _WAN, ModelCall((2, 16, 21, 90, 160), (2, 512, 4096)), "0 + 21x45x80 + 0", None),
    ("WAN22_T2V", _WAN_5B, ModelCall((1, 48, 31, 44, 80), (1, 512, 4096)), "0 + 31x22x40 + 0", None),
    (
        "MiniMaxH3",
        {"image_model": "minimax_h3"},
        ModelCall(
            (1, 1, 9),
            (1, 300, 5376),
            _packed((1, 24, 31, 48, 84), (1, 32, 2, 200), minimax_payload={"layout": _H3}),
        ),
        "700 + 31x24x42 + 0",
        (50,),
    ),
    ("HunyuanVideo15", _HV15, ModelCall((1, 32, 31, 45, 80), (1, 1000, 3584)), "1000 + 31x45x80 + 0", None),
    (
        "LTXAV",
        {"image_model": "ltxav"},
        ModelCall((1, 1, 9), (1, 1024, 6144), _packed((1, 128, 16, 34, 60), (1, 8, 126, 16))),
        "0 + 16x34x60 + 0",
        (48,),
    ),
    ("LTXV", {"image_model": "ltxv"}, ModelCall((1, 128, 16, 22, 40), (1, 256, 4096)), "0 + 16x22x40 + 0", (28,)),
    (
        "QwenImage",
        {"image_model": "qwen_image"},
        ModelCall((1, 16, 1, 166, 166), (1, 200, 3584)),
        "200 + 1x83x83 + 0",
        None,
    ),
    ("Krea2", {"image_model": "krea2"}, ModelCall((1, 16, 1, 128, 128), (1, 200, 30720)), "200 + 1x64x64 + 0", None),
    ("ZImage", _ZIMAGE, ModelCall((1, 16, 128, 128), (1, 100, 2560)), "128 + 1x64x64 + 0", None),
    ("Flux", _FLUX | {"txt_ids_dims": []}, ModelCall((1, 16, 128, 128), (1, 256, 4096)), "256 + 1x64x64 + 0", None),
    ("CogVideoX_T2V", _COG, ModelCall((1, 16, 13, 60, 90), (1, 226, 4096)), "226 + 13x30x45 + 0", (42,)),
    (
        "Kandinsky5",
        {"image_model": "kandinsky5"},
        ModelCall((1, 16, 31, 64, 96), (1, 200, 3584)),
        "0 + 31x32x48 + 0",
        None,
    ),
    (
        "SD3",
        _SD35M,
        ModelCall((1, 16, 128, 128), (1, 154, 4096)),
        "154 + 1x64x64 + 0, 0 + 1x64x64 + 0",
        (24, 13),
    ),
    ("SDXL", _SDXL, ModelCall((2, 4, 128, 128), (2, 77, 2048)), "0 + 1x64x64 + 0, 0 + 1x32x32 + 0", None),
]


@pytest.mark.parametrize("config, unet, call, layouts, counts", MODELS, ids=[model[0] for model in MODELS])
def test_full_size(comfy, config, unet, call, layouts, counts):
    from comfy import supported_models

    if not hasattr(supported_models, config):
        pytest.skip(f"this ComfyUI has no {config}")
    settings = getattr(supported_models, config)(dict(unet))
    settings.set_inference_dtype(torch.bfloat16, None)
    settings.custom_operations = None
    model = settings.get_model({}, "", device="meta").diffusion_model
    family = family_of(model)
    found = family.layout(model, call)
    found = found if isinstance(found, tuple) else (found,)
    assert ", ".join(layout.describe() for layout in found) == layouts
    assert family.counts(model) == counts
