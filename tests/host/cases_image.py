"""Tiny image models; see `cases`."""

from __future__ import annotations

import torch

from .cases import Case, Run, noise

_FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": 64}
_FLUX |= {"hidden_size": 256, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2}
_FLUX |= {"axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True}
_FLUX |= {"txt_ids_dims": []}
_FLUX2 = _FLUX | {"image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1}
_FLUX2 |= {"axes_dim": [32, 32, 32, 32], "mlp_ratio": 3.0, "global_modulation": True, "mlp_silu_act": True}
_FLUX2 |= {"vec_in_dim": None, "qkv_bias": False, "ops_bias": False, "theta": 2000, "txt_ids_dims": [3]}
_FLUX2 |= {"default_ref_method": "index", "ref_index_scale": 10.0, "depth_single_blocks": 1}
_CHROMA = {"image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": 64, "hidden_size": 256}
_CHROMA |= {"mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56]}
_CHROMA |= {"theta": 10000, "patch_size": 2, "qkv_bias": True, "in_dim": 64, "out_dim": 256, "hidden_dim": 64}
_CHROMA |= {"n_layers": 1, "vec_in_dim": None, "txt_ids_dims": []}
_QWEN = {"image_model": "qwen_image", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 128}
_QWEN |= {"joint_attention_dim": 64, "in_channels": 64}
_ZIMAGE = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": 64}
_ZIMAGE |= {"n_layers": 2, "qk_norm": True, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
_ZIMAGE |= {"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 1.0}
_ZIMAGE |= {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}
_LUMINA = _ZIMAGE | {"dim": 192, "axes_dims": [32, 32, 32], "n_kv_heads": 1, "axes_lens": [300, 512, 512]}
_LUMINA |= {"z_image_modulation": False, "time_scale": 1.0, "pad_tokens_multiple": None, "rope_theta": 10000.0}
_KREA = {"image_model": "krea2", "features": 256, "tdim": 64, "txtdim": 32, "heads": 2, "kvheads": 1}
_KREA |= {"multiplier": 1, "layers": 2, "txtlayers": 2, "txtheads": 1, "txtkvheads": 1}
_SD3 = {"in_channels": 16, "patch_size": 2, "depth": 2, "num_blocks": 2, "qk_norm": "rms", "adm_in_channels": 64}
_SD3 |= {"context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}}
_SD3 |= {"pos_embed_max_size": None, "num_patches": None, "pos_embed_scaling_factor": None, "input_size": None}
_AURA = {"max_seq": 1024, "dim": 512, "n_heads": 2, "n_double_layers": 1, "n_layers": 3, "cond_seq_dim": 64}
_AURA |= {"global_conddim": 512}
_HIDREAM = {"image_model": "hidream", "patch_size": 2, "in_channels": 16, "num_layers": 1, "num_single_layers": 2}
_HIDREAM |= {"attention_head_dim": 128, "num_attention_heads": 2, "caption_channels": [64, 48], "text_emb_dim": 64}
# Both experts take part: where a token is given to one of them alone, half a unit of rounding in the attention gives
# some tokens to the other, and moves the result by up to five units (fp16, 24 roundings at random).
_HIDREAM |= {"num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32)}
_HIDREAM |= {"max_resolution": [128, 128], "llama_layers": [0, 1, 1]}
_SDXL = {"use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True}
_SDXL |= {"legacy": False, "num_classes": "sequential", "adm_in_channels": 2816, "in_channels": 4}
_SDXL |= {"model_channels": 32, "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 2], "channel_mult": [1, 2, 2]}
_SDXL |= {"transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 1, 1, 2, 2], "context_dim": 2048}
_SDXL |= {"num_head_channels": 32, "use_linear_in_transformer": True, "use_temporal_attention": False}

_HUNYUAN = {"image_model": "hunyuan_video", "in_channels": 64, "out_channels": 64, "context_in_dim": 64}
_HUNYUAN |= {"hidden_size": 256, "mlp_ratio": 2.0, "num_heads": 2, "axes_dim": [64, 64], "theta": 256}
_HUNYUAN |= {"qkv_bias": True, "byt5": False, "meanflow": False, "meanflow_sum": False, "vec_in_dim": None}
_HUNYUAN |= {"depth": 1, "depth_single_blocks": 1, "patch_size": [1, 1], "guidance_embed": False}
_HUNYUAN |= {"use_cond_type_embedding": False, "vision_in_dim": None}

_IMAGES = (Run((1, 16, 29, 25), "7 + 1x15x13 + 0"), Run((1, 16, 34, 33), "7 + 1x17x17 + 0"))


def _references(channels: int, *sizes: tuple[int, int]):
    return lambda: {"reference_latents": [noise(1, channels, *size) for size in sizes]}


def _frames(*sizes: tuple[int, int]):
    return lambda: {"reference_latents": [noise(1, 16, 1, *size) for size in sizes]}


def _padded_text() -> dict:
    return {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]])}


def _llama() -> dict:
    return {"conditioning_llama3": noise(1, 2, 5, 48)}


def _source_image() -> dict:
    return {"concat_latent_image": noise(1, 16, 28, 26)}


CASES = (
    Case(
        "flux",
        "flux",
        "Flux",
        _FLUX,
        (*_IMAGES, Run((1, 16, 29, 25), "7 + 1x15x13 + 95", _references(16, (12, 10), (9, 26)))),
        3,
    ),
    Case(
        "flux2",
        "flux2",
        "Flux2",
        _FLUX2,
        (
            Run((1, 128, 15, 13), "512 + 1x15x13 + 0"),
            Run((1, 128, 17, 16), "512 + 1x17x16 + 0"),
            Run((1, 128, 15, 13), "512 + 1x15x13 + 12", _references(128, (3, 4))),
        ),
        2,
    ),
    Case("chroma", "chroma", "Chroma", _CHROMA, (*_IMAGES, Run((1, 16, 29, 25), "7 + 1x15x13 + 0", _padded_text)), 3),
    Case(
        "hunyuan_image",
        "hunyuan_video",
        "HunyuanImage21",
        _HUNYUAN,
        (Run((1, 64, 15, 13), "7 + 1x15x13 + 0"), Run((1, 64, 17, 17), "7 + 1x17x17 + 0")),
        2,
        cfg=1.0,
    ),
    Case(
        "qwen_image",
        "qwen_image",
        "QwenImage",
        _QWEN,
        (
            Run((1, 16, 1, 29, 25), "7 + 1x15x13 + 0"),
            Run((1, 16, 3, 21, 18), "7 + 3x11x9 + 0", since=(0, 17, 0)),
            Run((1, 16, 1, 29, 25), "7 + 1x15x13 + 95", _frames((12, 10), (9, 26))),
            Run((1, 16, 1, 29, 25), "7 + 1x15x13 + 0", _padded_text),
        ),
        2,
    ),
    Case(
        "z_image",
        "lumina2",
        "ZImage",
        _ZIMAGE,
        (
            Run((1, 16, 29, 25), "32 + 1x15x13 + 29"),
            Run((1, 16, 34, 33), "32 + 1x17x17 + 31"),
            Run((1, 16, 29, 25), "96 + 1x15x13 + 29", _references(16, (12, 10)), since=(0, 17, 0)),
        ),
        2,
    ),
    Case("lumina2", "lumina2", "Lumina2", _LUMINA, _IMAGES, 2),
    Case(
        "krea2",
        "krea2",
        "Krea2",
        _KREA,
        (
            Run((1, 16, 1, 29, 25), "7 + 1x15x13 + 0"),
            Run((1, 16, 1, 34, 33), "7 + 1x17x17 + 0"),
            Run(
                (1, 16, 1, 29, 25),
                "7 + 1x15x13 + 30",
                lambda: {**_frames((12, 10))(), "reference_latents_method": "index"},
                since=(0, 33, 0),
            ),
        ),
        2,
    ),
    Case("sd3", "sd3", "SD3", _SD3, _IMAGES, 2),
    Case("sd35_medium", "sd3", "SD3", _SD3 | {"x_block_self_attn_layers": [0]}, _IMAGES, 3),
    Case(
        "auraflow",
        "auraflow",
        "AuraFlow",
        _AURA,
        (Run((1, 4, 29, 25), "15 + 1x15x13 + 0"), Run((1, 4, 34, 33), "15 + 1x17x17 + 0")),
        3,
    ),
    Case(
        "hidream",
        "hidream",
        "HiDream",
        _HIDREAM,
        (
            Run((1, 16, 28, 26), "0 + 1x14x13 + 17"),
            Run((1, 16, 34, 34), "0 + 1x17x17 + 17"),
            Run((1, 16, 28, 26), "0 + 1x14x26 + 17", _source_image),
        ),
        3,
        always=_llama,
    ),
    Case(
        "sdxl",
        "sdxl",
        "SDXL",
        _SDXL,
        (Run((1, 4, 49, 45), "0 + 1x25x23 + 0"), Run((1, 4, 50, 46), "0 + 1x25x23 + 0")),
        11,
        text=(7, 2048),
        pooled=1280,
    ),
)
