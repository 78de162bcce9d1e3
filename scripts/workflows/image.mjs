// Image models: Flux 1, Qwen-Image and its editing model, Z-Image.

import { clip, decode, dualClip, group, hub, patch, picture, prompt, sampler, saveImage, shift, size, unet, vae, workflow } from "./parts.mjs";

const ONE = "**PARO Patch Model** stands between the model (and its LoRAs) and the sampler; that is all. The line under it says what " +
  "happened. Its `speed` is *balanced*: *quality* keeps more, *fast* less. To compare, switch `enabled` off.";
const HOPPER = "On Hopper and data-centre Blackwell GPUs (H100, H200, B200) blocks are dropped from 12,288 tokens on; below, all of them stay.";

const fluxText = hub("comfyanonymous/flux_text_encoders");
const ae = hub("Comfy-Org/Lumina_Image_2.0_Repackaged")("split_files/vae/ae.safetensors");
const flux = workflow("PARO Flux 1 text to image", [
  "Flux 1 with PARO", ONE,
  "Text tokens and Kontext references are never reordered and never dropped; only the image's own tokens are.",
  "Attention is a small share of an image at 1024 x 1024, so expect little there; the share grows with the size. This workflow " +
  "asks for 1536 x 1536, 9,216 tokens. Of 20 steps the first 4 are dense. Measured on an H200 with random weights, 2048 x 2048 in " +
  "8 steps is 1.3 to 1.5 times as fast; the README has the table.",
  HOPPER,
],
[group("Models",
  unet("model", hub("Comfy-Org/flux1-dev")("flux1-dev.safetensors")),
  dualClip(fluxText("clip_l.safetensors"), fluxText("t5xxl_fp16.safetensors"), "flux"), vae(ae))],
[group("Prompt and size",
  prompt("positive", "Prompt", "A market street in the rain at night, neon signs reflected in puddles, 35 mm photograph"),
  { id: "guidance", type: "FluxGuidance", widgets: { guidance: 3.5 }, inputs: { conditioning: ["positive", 0] } },
  { id: "negative", type: "ConditioningZeroOut", inputs: { conditioning: ["positive", 0] } },
  size("EmptySD3LatentImage", { width: 1536, height: 1536 }))],
[group("PARO", patch("paro", undefined, "model"))],
[group("Image",
  sampler("sample", undefined, { model: ["paro", 0], positive: ["guidance", 0], negative: ["negative", 0], latent: ["empty", 0], steps: 20, cfg: 1 }),
  decode("sample"), saveImage("flux1"))]);

const qwenFile = hub("Comfy-Org/Qwen-Image_ComfyUI");
const qwenEncoders = [
  clip(qwenFile("split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors"), "qwen_image"),
  vae(qwenFile("split_files/vae/qwen_image_vae.safetensors")),
];
const qwen = workflow("PARO Qwen-Image text to image", [
  "Qwen-Image with PARO", ONE,
  "1328 x 1328 has 6,889 tokens: little attention to save. Of 50 steps the first 10 are dense. Measured on an H200 with random " +
  "weights, 8 steps at this size are 1.1 times as fast; larger images gain more.",
  HOPPER,
],
[group("Models", unet("model", qwenFile("split_files/diffusion_models/qwen_image_2512_fp8_e4m3fn.safetensors")), ...qwenEncoders)],
[group("Prompt and size",
  prompt("positive", "Positive prompt", "A bookshop window at dusk with a hand-painted sign that reads \"Second chapter\", warm light, wet pavement"),
  prompt("negative", "Negative prompt", "low resolution, blurry, deformed hands, oversaturated", 110),
  size("EmptySD3LatentImage", { width: 1328, height: 1328 }))],
[group("PARO", patch("paro", undefined, "model"))],
[group("Image", shift("shift", "ModelSamplingAuraFlow", 3.1, "paro"),
  sampler("sample", undefined, { model: ["shift", 0], positive: ["positive", 0], negative: ["negative", 0], latent: ["empty", 0], steps: 50, cfg: 4 }),
  decode("sample"), saveImage("qwen_image"))]);

const edited = (id, title, text) => ({
  id, type: "TextEncodeQwenImageEditPlus", title, height: 170, widgets: { prompt: text },
  inputs: { clip: ["clip", 0], vae: ["vae", 0], image1: ["scaled", 0] },
});
const edit = workflow("PARO Qwen-Image-Edit", [
  "Qwen-Image-Edit with PARO", ONE,
  "The reference stands behind the image's own tokens in the sequence: it is never reordered and never dropped, so the gain is that " +
  "of the image alone. Of 40 steps the first 8 are dense.",
  "At one megapixel the image has some 4,000 tokens, below the 6,144 from which blocks are dropped: there attention runs in 8 bits " +
  "with every block kept, on Hopper in ComfyUI's own attention. Expect little at this size; not measured.",
],
[group("Models",
  unet("model", hub("Comfy-Org/Qwen-Image-Edit_ComfyUI")("split_files/diffusion_models/qwen_image_edit_2511_bf16.safetensors")), ...qwenEncoders)],
[group("Image and what to change",
  picture("picture", "Image to edit"),
  { id: "scaled", type: "FluxKontextImageScale", inputs: { image: ["picture", 0] } },
  edited("positive", "What to change", "Make it a winter scene with fresh snow, keep everything else as it is"),
  edited("negative", "Negative prompt", ""),
  { id: "latent", type: "VAEEncode", inputs: { pixels: ["scaled", 0], vae: ["vae", 0] } })],
[group("PARO", patch("paro", undefined, "model"))],
[group("Image", shift("shift", "ModelSamplingAuraFlow", 3.1, "paro"),
  { id: "norm", type: "CFGNorm", widgets: { strength: 1 }, inputs: { model: ["shift", 0] } },
  sampler("sample", undefined, { model: ["norm", 0], positive: ["positive", 0], negative: ["negative", 0], latent: ["latent", 0], steps: 40, cfg: 4 }),
  decode("sample"), saveImage("qwen_image_edit"))]);

const zFile = hub("Comfy-Org/z_image_turbo");
const zImage = workflow("PARO Z-Image Turbo text to image", [
  "Z-Image Turbo with PARO", ONE,
  "1536 x 1536 has 9,216 tokens. Of 8 steps the first is dense. Measured on an H200 with random weights, 8 steps at this size are " +
  "1.2 times as fast, at 1024 x 1024 1.1 times.",
  HOPPER,
],
[group("Models",
  unet("model", zFile("split_files/diffusion_models/z_image_turbo_bf16.safetensors")),
  clip(zFile("split_files/text_encoders/qwen_3_4b.safetensors"), "lumina2"),
  vae(zFile("split_files/vae/ae.safetensors")))],
[group("Prompt and size",
  prompt("positive", "Prompt", "Portrait of an old fisherman mending a net on a pier, overcast light, fine detail, photograph"),
  { id: "negative", type: "ConditioningZeroOut", inputs: { conditioning: ["positive", 0] } },
  size("EmptySD3LatentImage", { width: 1536, height: 1536 }))],
[group("PARO", patch("paro", undefined, "model"))],
[group("Image", shift("shift", "ModelSamplingAuraFlow", 3, "paro"),
  sampler("sample", undefined, { model: ["shift", 0], positive: ["positive", 0], negative: ["negative", 0], latent: ["empty", 0],
    steps: 8, cfg: 1, sampler_name: "res_multistep" }),
  decode("sample"), saveImage("z_image"))]);

export const IMAGE = [flux, qwen, edit, zImage];
