// Other video models: LTX-2, HunyuanVideo 1.5, MiniMax H3.

import { clip, decode, dualClip, group, hub, loader, lora, patch, prompt, sampler, saveVideo, shift, size, unet, vae, workflow } from "./parts.mjs";

const ONE = "**PARO Patch Model** stands between the model (and its LoRAs) and the sampler; that is all. The line under it says what " +
  "happened. Its `speed` is *balanced*: *quality* keeps more, *fast* less. To compare, switch `enabled` off.";
const measured = (gain) => `Measured on an H200 with random weights: ${gain} as fast as with ComfyUI's default attention; the README has the table.`;

const ltxFile = hub("Lightricks/LTX-2.3");
const LTX = hub("Lightricks/LTX-2.3-fp8")("ltx-2.3-22b-dev-fp8.safetensors");
const LENGTH = 121, FPS = 24;
const av = (id, video, audio) =>
  ({ id, type: "LTXVConcatAVLatent", inputs: { video_latent: video, audio_latent: audio } });
const parted = (id, source) => ({ id, type: "LTXVSeparateAVLatent", inputs: { av_latent: [source, 0] } });
const stage = (id, title, sigmas, name, seeds, latent) => [
  { id: `noise_${id}`, type: "RandomNoise", widgets: { noise_seed: 0, control_after_generate: seeds } },
  { id: `sampler_${id}`, type: "KSamplerSelect", widgets: { sampler_name: name } },
  { id: `sigmas_${id}`, type: "ManualSigmas", widgets: { sigmas } },
  { id, type: "SamplerCustomAdvanced", title, inputs: { noise: [`noise_${id}`, 0], guider: ["guider", 0],
    sampler: [`sampler_${id}`, 0], sigmas: [`sigmas_${id}`, 0], latent_image: [latent, 0] } },
];

const ltx = workflow("PARO LTX-2 text to video in two stages", [
  "LTX-2 in two stages, with sound and PARO",
  "Stage 1 makes 960 x 544, stage 2 refines twice that size. One **PARO Patch Model** serves both; only the video's " +
  "self-attention is touched, sound and text are not.",
  "Stage 1 has too few tokens for PARO (8,160, it takes over from 8,192 on), so ComfyUI's attention runs there. Stage 2 has 32,640, and all its three steps are sparse. " +
  measured("stage 2 alone is 1.4 to 1.8 times"),
  "The distilled LoRA goes before PARO. `speed` *quality* keeps more; to compare, switch `enabled` off.",
],
[group("Models",
  loader("model", "CheckpointLoaderSimple", "checkpoints", { ckpt_name: LTX }),
  lora("lora", ltxFile("ltx-2.3-22b-distilled-lora-384.safetensors"), "model", "Distilled LoRA", 0.5),
  { id: "clip", type: "LTXAVTextEncoderLoader", widgets: { text_encoder: "gemma_3_12B_it_fp4_mixed.safetensors",
    ckpt_name: "ltx-2.3-22b-dev-fp8.safetensors", device: "default" },
    models: [{ name: "gemma_3_12B_it_fp4_mixed.safetensors", directory: "text_encoders",
      url: hub("Comfy-Org/ltx-2")("split_files/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors") }] },
  loader("audio_vae", "LTXVAudioVAELoader", "checkpoints", { ckpt_name: LTX }),
  loader("upscaler", "LatentUpscaleModelLoader", "latent_upscale_models",
    { model_name: ltxFile("ltx-2.3-spatial-upscaler-x2-1.1.safetensors") })),
group("PARO", patch("paro", undefined, "lora"))],
[group("Prompt and size",
  prompt("positive", "Positive prompt", "A street musician plays a slow tune on a violin under a bridge in the rain, the camera glides past her, drops and distant traffic are heard"),
  prompt("negative", "Negative prompt", "blurry, low quality, still frame, subtitles, watermark", 110),
  { id: "rate", type: "LTXVConditioning", widgets: { frame_rate: FPS }, inputs: { positive: ["positive", 0], negative: ["negative", 0] } },
  { id: "guider", type: "CFGGuider", widgets: { cfg: 1 }, inputs: { model: ["paro", 0], positive: ["rate", 0], negative: ["rate", 1] } },
  size("EmptyLTXVLatentVideo", { width: 960, height: 544, length: LENGTH }),
  { id: "silence", type: "LTXVEmptyLatentAudio", widgets: { frames_number: LENGTH, frame_rate: FPS, batch_size: 1 }, inputs: { audio_vae: ["audio_vae", 0] } })],
[group("Stage 1", av("latent", ["empty", 0], ["silence", 0]),
  ...stage("first", "Stage 1", "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0", "euler_ancestral_cfg_pp", "randomize", "latent"),
  parted("parts", "first"))],
[group("Stage 2",
  { id: "larger", type: "LTXVLatentUpsampler", inputs: { samples: ["parts", 0], upscale_model: ["upscaler", 0], vae: ["model", 2] } },
  av("latent_2", ["larger", 0], ["parts", 1]),
  ...stage("second", "Stage 2", "0.85, 0.7250, 0.4219, 0.0", "euler_cfg_pp", "fixed", "latent_2"),
  parted("parts_2", "second"))],
[group("Video with sound",
  { id: "decode", type: "VAEDecodeTiled", widgets: { tile_size: 768, overlap: 64, temporal_size: 4096, temporal_overlap: 4 },
    inputs: { samples: ["parts_2", 0], vae: ["model", 2] } },
  { id: "sound", type: "LTXVAudioVAEDecode", inputs: { samples: ["parts_2", 1], audio_vae: ["audio_vae", 0] } },
  ...saveVideo("ltx2", FPS, ["sound", 0]))]);

const hunyuanFile = hub("Comfy-Org/HunyuanVideo_1.5_repackaged");
const hunyuan = workflow("PARO HunyuanVideo 1.5 text to video", [
  "HunyuanVideo 1.5 with PARO", ONE,
  "The first 4 of 20 steps are dense and calibrate on the way, 16 are sparse. 720p with 121 frames has some 112,000 tokens, where " +
  "attention takes most of the time. " + measured("4 steps at 720p are 2.6 times"),
],
[group("Models",
  unet("model", hunyuanFile("split_files/diffusion_models/hunyuanvideo1.5_720p_t2v_fp16.safetensors")),
  dualClip(hunyuanFile("split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors"),
    hunyuanFile("split_files/text_encoders/byt5_small_glyphxl_fp16.safetensors"), "hunyuan_video_15"),
  vae(hunyuanFile("split_files/vae/hunyuanvideo15_vae_fp16.safetensors")))],
[group("Prompt and size",
  prompt("positive", "Positive prompt", "A red vintage tram climbs a steep street in the morning fog, people step aside, the camera follows it from behind"),
  prompt("negative", "Negative prompt", "", 110),
  size("EmptyHunyuanVideo15Latent", { width: 1280, height: 720, length: 121 }))],
[group("PARO", patch("paro", undefined, "model"))],
[group("Sampling", shift("shift", "ModelSamplingSD3", 7, "paro"),
  sampler("sample", undefined, { model: ["shift", 0], positive: ["positive", 0], negative: ["negative", 0], latent: ["empty", 0], steps: 20, cfg: 6 }))],
[group("Video", decode("sample"), ...saveVideo("hunyuan_video_15", 24))]);

const minimaxFile = hub("Comfy-Org/MiniMax-H3");
const minimax = workflow("PARO MiniMax H3 text to video", [
  "MiniMax H3 with sound and PARO", ONE,
  "The first 4 of 20 steps are dense and calibrate on the way, 16 are sparse. 1344 x 768 and 5 seconds have some 31,000 tokens. " +
  measured("8 steps are 1.9 times"),
  "An image at `first_frame` or `last_frame` makes it image to video. Weights made for another sparse attention (VSA, FastH3) are " +
  "not for PARO: ComfyUI 0.33 cannot tell them from the others, so do not patch them.",
],
[group("Models",
  unet("model", minimaxFile("diffusion_models/minimax_h3_fl2va_pruned_int8_convrot.safetensors")),
  clip(minimaxFile("text_encoders/qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors"), "minimax"),
  vae(minimaxFile("vae/minimax_h3_video_vae_fp16.safetensors"), "vae", "Video VAE"),
  vae(minimaxFile("vae/minimax_h3_audio_vae_fp32.safetensors"), "audio_vae", "Audio VAE"))],
[group("Prompt and size",
  { id: "start", type: "MiniMaxH3ImageToVideo", height: 420, inputs: { clip: ["clip", 0], vae: ["vae", 0] }, widgets: { width: 1344, height: 768, length: 124,
    prompt: "A potter shapes a bowl on a turning wheel in a sunlit workshop, close shot of the hands, then the camera rises to her face. Sound: the hum of the wheel, birds outside." } })],
[group("PARO", patch("paro", undefined, "model"))],
[group("Sampling",
  { id: "noise", type: "RandomNoise", widgets: { noise_seed: 0, control_after_generate: "randomize" } },
  { id: "guider", type: "BasicGuider", inputs: { model: ["paro", 0], conditioning: ["start", 0] } },
  { id: "sampler", type: "KSamplerSelect", widgets: { sampler_name: "res_multistep" } },
  { id: "sigmas", type: "BasicScheduler", widgets: { scheduler: "simple", steps: 20, denoise: 1 }, inputs: { model: ["paro", 0] } },
  { id: "sample", type: "SamplerCustomAdvanced", inputs: { noise: ["noise", 0], guider: ["guider", 0], sampler: ["sampler", 0],
    sigmas: ["sigmas", 0], latent_image: ["start", 1] } })],
[group("Video with sound", decode("sample"),
  { id: "sound", type: "VAEDecodeAudio", inputs: { samples: ["sample", 0], vae: ["audio_vae", 0] } },
  ...saveVideo("minimax_h3", 24, ["sound", 0]))]);

export const VIDEO = [ltx, hunyuan, minimax];
