"""Tiny video models; see `cases`."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .cases import Case, Run, noise

_WAN = {"image_model": "wan2.1", "dim": 256, "ffn_dim": 64, "num_layers": 2, "num_heads": 2, "text_dim": 64}
_WAN |= {"freq_dim": 64, "in_dim": 16, "out_dim": 16}
_VIDEO = (1, 16, 5, 13, 17)


def _wan(name: str, config: str, *runs: Run, family: str = "wan", sites: int = 2, **unet) -> Case:
    return Case(f"wan_{name}", family, config, _WAN | {"model_type": name} | unet, runs, sites)


def _references(*shapes: tuple[int, ...]):
    return lambda: {"reference_latents": [noise(*shape) for shape in shapes]}


def _small_adapters(model) -> None:
    """Animate's face and motion encoders have fixed sizes and are not run without a face."""
    for name in ("motion_encoder", "face_adapter", "face_encoder"):
        setattr(model, name, torch.nn.Identity())


_HUNYUAN = {"image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "context_in_dim": 64}
_HUNYUAN |= {"hidden_size": 256, "mlp_ratio": 2.0, "num_heads": 2, "axes_dim": [16, 56, 56], "theta": 256}
_HUNYUAN |= {"qkv_bias": True, "byt5": False, "meanflow": False, "meanflow_sum": False}
_HV10 = {"vec_in_dim": 64, "depth": 1, "depth_single_blocks": 2, "patch_size": [1, 2, 2], "guidance_embed": True}
_HV10 |= {"use_cond_type_embedding": False, "vision_in_dim": None}
_HV15 = {"vec_in_dim": None, "depth": 2, "depth_single_blocks": 0, "patch_size": [1, 1, 1], "guidance_embed": False}
_HV15 |= {"use_cond_type_embedding": True, "vision_in_dim": 32, "in_channels": 65, "out_channels": 32}
_LTX = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128}
_LTX |= {"caption_channels": 64, "in_channels": 128}
_H3 = {"image_model": "minimax_h3", "hidden_size": 256, "num_layers": 2, "token_refiner_num_layers": 1}
_H3 |= {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_hidden_size": 128, "text_dim": 64}
_H3 |= {"timestep_input_dim": 32, "time_embed_hidden_size": 64, "time_embed_dim": 64}
_COG = {"image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2}
_COG |= {"text_embed_dim": 64, "time_embed_dim": 64, "use_rotary_positional_embeddings": True}
_MOCHI = {"image_model": "mochi_preview", "depth": 2, "num_heads": 2, "hidden_size_x": 256, "hidden_size_y": 128}
_MOCHI |= {"mlp_ratio_x": 48, "mlp_ratio_y": 48, "t5_feat_dim": 64, "t5_token_length": 16, "patch_size": 2}
_MOCHI |= {"in_channels": 12, "learn_sigma": False, "timestep_mlp_bias": True, "patch_embed_bias": True}
_MOCHI |= {"qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "rope_theta": 10000.0}
_MOCHI |= {"timestep_scale": 1000.0, "use_t5": True, "attend_to_padding": False}
_K5 = {"image_model": "kandinsky5", "model_dim": 128, "axes_dims": (16, 24, 24), "time_dim": 64, "ff_dim": 128}
_K5 |= {"num_text_blocks": 1, "num_visual_blocks": 2, "in_text_dim": 64, "in_text_dim2": 64}
_COSMOS = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16}
_COSMOS |= {"concat_padding_mask": True, "model_channels": 256, "num_blocks": 2, "num_heads": 2}
_COSMOS |= {"crossattn_emb_channels": 64, "patch_spatial": 2, "patch_temporal": 1, "use_adaln_lora": True}
_COSMOS |= {"adaln_lora_dim": 64, "pos_emb_cls": "rope3d", "pos_emb_learnable": True}
_COSMOS |= {"pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30, "extra_per_block_abs_pos_emb": False}


_COSMOS1 = {"max_img_h": 64, "max_img_w": 64, "max_frames": 32, "in_channels": 16, "out_channels": 16}
_COSMOS1 |= {"patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "model_channels": 256}
_COSMOS1 |= {"block_config": "FA-CA-MLP", "num_blocks": 2, "num_heads": 2, "block_x_format": "THWBD"}
_COSMOS1 |= {"crossattn_emb_channels": 64, "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop"}
_COSMOS1 |= {"affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 64}
_COSMOS1 |= {"extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable"}


def _no_connectors(model) -> None:
    """LTX-2's text connectors have 700 M parameters whatever the model's size; refined text does not pass them."""
    model.video_embeddings_connector = model.audio_embeddings_connector = torch.nn.Identity()


def _no_adapter(model) -> None:
    """Anima's text adapter has a fixed size; without token ids the text does not pass it."""
    model.llm_adapter = torch.nn.Identity()
    model.build_pos_embed(device="cpu")


def _rope(model) -> None:
    model.rope.inv_freq = 1.0 / 10.0 ** torch.linspace(0, 3, model.rope.inv_freq.shape[0])


def _h3_references() -> dict:
    """An image (30 tokens), and a video of two frames (24) with sound (6), in front of audio (12) and video."""
    image = {"kind": "image", "latent_h": 10, "latent_w": 12, "latent": noise(1, 24, 1, 10, 12)}
    video = {"kind": "video_audio", "latent_t": 2, "latent_h": 6, "latent_w": 8, "latent": noise(1, 24, 2, 6, 8)}
    return {"minimax_refs": [image, {**video, "ref_audio_t": 3, "audio_latent": noise(1, 32, 2, 3)}]}


def _guides(dropped: int = 0) -> dict:
    """One guide frame appended to LTX's latent of 4 x 9 x 11, some of its tokens taken out by the mask."""
    mask = torch.ones(1, 1, 4, 9, 11)
    mask.view(-1)[-dropped or mask.numel() :] = -1
    positions = torch.rand(1, 3, 99, 2, generator=torch.Generator().manual_seed(1)) * 8
    return {"keyframe_idxs": positions, "concat_mask": mask}


def _padded_text() -> dict:
    return {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]])}


def _vision() -> dict:
    return {"clip_vision_output": SimpleNamespace(last_hidden_state=noise(1, 12, 32))}


CASES = (
    _wan("t2v", "WAN21_T2V", Run(_VIDEO, "0 + 5x7x9 + 0"), Run((1, 16, 3, 22, 19), "0 + 3x11x10 + 0")),
    _wan(
        "i2v",
        "WAN21_FunControl2V",
        Run(_VIDEO, "0 + 5x7x9 + 0"),
        Run(_VIDEO, "63 + 5x7x9 + 0", _references((1, 16, 1, 14, 18))),
        in_dim=36,
        in_dim_ref_conv=16,
    ),
    _wan(
        "vace",
        "WAN21_Vace",
        # The host does not pad the control video: odd latents fail in the host itself.
        Run((1, 16, 5, 14, 18), "0 + 5x7x9 + 0"),
        Run((1, 16, 3, 22, 20), "0 + 3x11x10 + 0"),
        Run(
            (1, 16, 5, 14, 18),
            "0 + 5x7x9 + 0",
            lambda: {"vace_frames": [noise(1, 32, 5, 14, 18)] * 2, "vace_strength": [1.0, 0.5]},
            sites=6,
            batch=1,
        ),
        family="wan_vace",
        sites=4,
        vace_layers=2,
        vace_in_dim=96,
    ),
    _wan(
        "camera",
        "WAN21_Camera",
        Run(_VIDEO, "0 + 5x7x9 + 0"),
        Run((1, 16, 3, 22, 19), "0 + 3x11x10 + 0"),
        in_dim=32,
        in_dim_control_adapter=24,
    ),
    Case(
        "wan_animate",
        "wan",
        "WAN22_Animate",
        _WAN | {"model_type": "animate", "in_dim": 36},
        (Run(_VIDEO, "0 + 5x7x9 + 0"), Run((1, 16, 3, 22, 19), "0 + 3x11x10 + 0")),
        2,
        prepare=_small_adapters,
        device="meta",
    ),
    _wan(
        "s2v",
        "WAN22_S2V",
        Run(_VIDEO, "0 + 5x7x9 + 0"),
        Run((1, 16, 5, 14, 18), "0 + 5x7x9 + 63", _references((1, 16, 1, 14, 18))),
        Run(
            (1, 16, 5, 16, 16),
            "0 + 5x8x8 + 160",
            lambda: {"reference_latents": [noise(1, 16, 1, 16, 16)], "reference_motion": noise(1, 16, 19, 16, 16)},
        ),
        audio_dim=32,
        num_audio_token=4,
        audio_inject_layers=[0],
        cond_dim=16,
    ),
    _wan(
        "humo",
        "WAN21_HuMo",
        Run(_VIDEO, "0 + 5x7x9 + 0"),
        Run((1, 16, 3, 22, 20), "0 + 3x11x10 + 110", _references((1, 16, 1, 22, 20))),
        in_dim=36,
        audio_token_num=16,
    ),
    _wan(
        "scail",
        "WAN21_SCAIL",
        Run((1, 16, 5, 14, 18), "0 + 5x7x9 + 0"),
        Run((1, 16, 5, 14, 18), "63 + 5x7x9 + 0", _references((1, 16, 1, 14, 18))),
        Run((1, 16, 5, 14, 18), "0 + 5x7x9 + 100", lambda: {"pose_video_latent": noise(1, 16, 5, 8, 10)}),
        in_dim=20,
    ),
    _wan(
        "animate2", "WAN_Animate2", Run(_VIDEO, "0 + 5x7x9 + 0"), Run((1, 16, 3, 22, 19), "0 + 3x11x10 + 0"), in_dim=36
    ),
    Case(
        "wan_dancer",
        "wan",
        "WAN22_WanDancer",
        _WAN | {"model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0]},
        (Run(_VIDEO, "0 + 5x7x9 + 0"), Run((1, 16, 3, 22, 19), "0 + 3x11x10 + 0")),
        2,
    ),
    Case(
        "hunyuan_video",
        "hunyuan_video",
        "HunyuanVideo",
        _HUNYUAN | _HV10,
        (
            Run((1, 16, 5, 14, 18), "7 + 5x7x9 + 0"),
            Run((1, 16, 3, 22, 20), "7 + 3x11x10 + 0"),
            Run((1, 16, 5, 14, 18), "70 + 5x7x9 + 0", lambda: {"ref_latent": noise(1, 16, 1, 14, 18)}, batch=1),
            Run((1, 16, 5, 14, 18), "7 + 5x7x9 + 0", _padded_text, batch=1),
        ),
        3,
        cfg=1.0,  # a reference or padded text fails in the host with two prompts in a batch
    ),
    Case(
        "hunyuan_video15",
        "hunyuan_video",
        "HunyuanVideo15",
        _HUNYUAN | _HV15,
        (
            Run((1, 32, 5, 7, 9), "7 + 5x7x9 + 0"),
            Run((1, 32, 3, 11, 10), "7 + 3x11x10 + 0"),
            Run((1, 32, 5, 7, 9), "19 + 5x7x9 + 0", _vision),
        ),
        2,
    ),
    Case(
        "ltxv",
        "ltx_video",
        "LTXV",
        {"image_model": "ltxv", **_LTX},
        (
            Run((1, 128, 3, 9, 11), "0 + 3x9x11 + 0"),
            Run((1, 128, 5, 7, 9), "0 + 5x7x9 + 0"),
            Run((1, 128, 4, 9, 11), "0 + 3x9x11 + 99", _guides, since=(0, 17, 0)),
            Run((1, 128, 4, 9, 11), "0 + 3x9x11 + 88", lambda: _guides(11), since=(0, 17, 0)),
        ),
        2,
        always=lambda: {"attention_mask": torch.ones(1, 7, dtype=torch.int)},
    ),
    Case(
        "ltxav",
        "ltx_video",
        "LTXAV",
        {
            "image_model": "ltxav",
            **_LTX,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 64,
            "audio_cross_attention_dim": 128,
        },
        (
            Run(((1, 128, 3, 9, 11), (1, 8, 17, 16)), "0 + 3x9x11 + 0"),
            Run(((1, 128, 5, 7, 9), (1, 8, 17, 16)), "0 + 5x7x9 + 0"),
        ),
        2,
        text=(7, 128),
        always=lambda: {"attention_mask": torch.ones(1, 7, dtype=torch.int)},
        prepare=_no_connectors,
        device="meta",
    ),
    Case(
        "minimax_h3",
        "minimax_h3",
        "MiniMaxH3",
        _H3,
        (
            Run(((1, 24, 5, 13, 17), (1, 32, 2, 6)), "19 + 5x7x9 + 0", batch=1),
            Run(((1, 24, 3, 22, 19), (1, 32, 2, 6)), "19 + 3x11x10 + 0", batch=1),
            Run(
                ((1, 24, 5, 14, 18), (1, 32, 2, 6)),
                "82 + 5x7x9 + 0",
                lambda: {"minimax_keyframes": [{"latent": noise(1, 24, 1, 14, 18), "resolved_frame_index": 0}]},
                batch=1,
            ),
            Run(((1, 24, 5, 13, 17), (1, 32, 2, 6)), "79 + 5x7x9 + 0", _h3_references, batch=1),
        ),
        2,
        prepare=_rope,
    ),
    Case(
        "cogvideox",
        "cogvideox",
        "CogVideoX_T2V",
        _COG,
        (Run((1, 16, 5, 14, 18), "7 + 5x7x9 + 0"), Run((1, 16, 5, 13, 17), "7 + 5x7x9 + 0")),
        2,
    ),
    Case(
        "cogvideox15",
        "cogvideox",
        "CogVideoX_T2V",
        _COG | {"patch_size_t": 2},
        (Run((1, 16, 9, 13, 17), "7 + 5x7x9 + 0"), Run((1, 16, 5, 22, 19), "7 + 3x11x10 + 0")),
        2,
    ),
    Case(
        "mochi",
        "mochi",
        "GenmoMochi",
        _MOCHI,
        (Run((1, 12, 5, 14, 18), "0 + 5x7x9 + 16"), Run((1, 12, 3, 22, 20), "0 + 3x11x10 + 16")),
        2,
        text=(16, 64),
        always=lambda: {"attention_mask": torch.ones(1, 16, dtype=torch.int)},
    ),
    Case(
        "kandinsky5",
        "kandinsky5",
        "Kandinsky5",
        _K5 | {"visual_embed_dim": 132},
        (Run((1, 16, 5, 14, 18), "0 + 5x7x9 + 0"), Run((1, 16, 3, 22, 20), "0 + 3x11x10 + 0")),
        2,
    ),
    Case(
        "cosmos_predict2",
        "cosmos_predict2",
        "CosmosT2IPredict2",
        {"image_model": "cosmos_predict2", **_COSMOS},
        (
            Run((1, 16, 5, 14, 18), "0 + 5x7x9 + 0"),
            Run((1, 16, 1, 33, 31), "0 + 1x17x16 + 0", since=(0, 17, 0)),
        ),
        2,
    ),
    Case(
        "anima",
        "cosmos_predict2",
        "Anima",
        {"image_model": "anima", **_COSMOS},
        (Run((1, 16, 1, 29, 25), "0 + 1x15x13 + 0"), Run((1, 16, 1, 33, 31), "0 + 1x17x16 + 0")),
        2,
        prepare=_no_adapter,
        device="meta",
    ),
    Case(
        "cosmos1",
        "cosmos1",
        "CosmosT2V",
        {"image_model": "cosmos", **_COSMOS1},
        (Run((1, 16, 5, 14, 18), "0 + 5x7x9 + 0"), Run((1, 16, 3, 22, 20), "0 + 3x11x10 + 0")),
        2,
        always=lambda: {"attention_mask": torch.ones(1, 7, dtype=torch.int)},
    ),
)
