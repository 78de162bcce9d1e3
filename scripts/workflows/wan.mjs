// Wan 2.2 14B: two models, one for high noise and one for low, each with PARO.

import { clip, decode, group, hub, lora, patch, picture, prompt, saveVideo, shift, size, unet, vae, workflow } from "./parts.mjs";

const wan22 = hub("Comfy-Org/Wan_2.2_ComfyUI_Repackaged");
const wan21 = hub("Comfy-Org/Wan_2.1_ComfyUI_repackaged");
const NEGATIVE = "blurry, low quality, distorted, static, subtitles, watermark";

const models = (kind) => ["high", "low"].map((noise) =>
  unet(noise, wan22(`split_files/diffusion_models/wan2.2_${kind}_${noise}_noise_14B_fp8_scaled.safetensors`),
    `${noise === "high" ? "High" : "Low"} noise model`));
const encoders = [
  clip(wan21("split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"), "wan"),
  vae(wan22("split_files/vae/wan_2.1_vae.safetensors")),
];
const loras = ["high", "low"].map((noise) =>
  lora(`lora_${noise}`, wan22(`split_files/loras/wan2.2_i2v_lightx2v_4steps_lora_v1_${noise}_noise.safetensors`), noise,
    `4-step LoRA (${noise} noise)`));
const patches = (high, low) => [
  patch("paro_high", "PARO Patch Model (high noise)", high), patch("paro_low", "PARO Patch Model (low noise)", low),
];

const sampler = (id, title, model, inputs, values) => ({
  id, type: "KSamplerAdvanced", title,
  widgets: { noise_seed: 0, sampler_name: "euler", scheduler: "simple", ...values },
  inputs: { model: [model, 0], ...inputs },
});
// The steps of both models; `inputs` are the prompts and the first latent.
function sampling(inputs, { steps, cfg, shift: value }) {
  const half = steps / 2;
  return [
    group("High noise steps", shift("shift_high", "ModelSamplingSD3", value, "paro_high"),
      sampler("first", "High noise steps", "shift_high", inputs, { steps, cfg, add_noise: "enable",
        control_after_generate: "randomize", start_at_step: 0, end_at_step: half, return_with_leftover_noise: "enable" })),
    group("Low noise steps", shift("shift_low", "ModelSamplingSD3", value, "paro_low"),
      sampler("second", "Low noise steps", "shift_low", { ...inputs, latent_image: ["first", 0] }, { steps, cfg, add_noise: "disable",
        control_after_generate: "fixed", start_at_step: half, end_at_step: 10000, return_with_leftover_noise: "disable" })),
  ];
}
const result = (prefix) => group("Video", decode("second"), ...saveVideo(prefix, 16));

const TWO = "Each of the two models has its own **PARO Patch Model**, since they are calibrated apart. " +
  "The line under each node says what happened. *quality* keeps more, *fast* less: set `speed` on both. To compare, switch " +
  "`enabled` off on both.";
const expected = (dense, gain) => `Steps: ${dense}. Measured on an H200 with random weights, ${gain} as fast as with ComfyUI's ` +
  "default attention; the README has the table. The gain grows with the number of tokens.";

const text = workflow("PARO Wan 2.2 14B text to video", [
  "Wan 2.2 14B, text to video, with PARO", TWO,
  expected("the first 4 of 20 are dense, all of the low noise model's are sparse", "480p in 20 steps is 1.8 times"),
  "LoRAs go between loader and PARO.",
],
[group("Models", ...models("t2v"), ...encoders)],
[group("Prompt and size",
  prompt("positive", "Positive prompt", "A lighthouse on a rocky coast at dusk, waves breaking below, the camera slowly circles it"),
  prompt("negative", "Negative prompt", NEGATIVE, 110),
  size("EmptyHunyuanLatentVideo", { width: 1280, height: 720, length: 81 }))],
[group("PARO", ...patches("high", "low"))],
sampling({ positive: ["positive", 0], negative: ["negative", 0], latent_image: ["empty", 0] }, { steps: 20, cfg: 3.5, shift: 8 }),
[result("wan22_t2v")]);

const first = (text) => group("First frame, prompt and size",
  picture("picture", "First frame"), prompt("positive", "Positive prompt", text), prompt("negative", "Negative prompt", NEGATIVE, 110),
  { id: "start", type: "WanImageToVideo", widgets: { width: 1280, height: 720, length: 81, batch_size: 1 },
    inputs: { positive: ["positive", 0], negative: ["negative", 0], vae: ["vae", 0], start_image: ["picture", 0] } });
const started = { positive: ["start", 0], negative: ["start", 1], latent_image: ["start", 2] };
const MOTION = "The camera moves slowly forward, leaves and hair stir in the wind";

const image = workflow("PARO Wan 2.2 14B image to video", [
  "Wan 2.2 14B, image to video, with PARO", TWO,
  expected("the first 4 of 20 are dense, all of the low noise model's are sparse", "480p in 20 steps is 1.8 times"),
  "Choose your own first frame. LoRAs go between loader and PARO.",
],
[group("Models", ...models("i2v"), ...encoders)],
[first(MOTION)],
[group("PARO", ...patches("high", "low"))],
sampling(started, { steps: 20, cfg: 3.5, shift: 8 }),
[result("wan22_i2v")]);

const fewSteps = workflow("PARO Wan 2.2 14B image to video in 4 steps", [
  "Wan 2.2 14B, image to video in 4 steps, with PARO",
  "The 4-step LoRAs stand between the loaders and PARO, so that PARO calibrates on the weights that run.", TWO,
  expected("the first of 4 is dense, three are sparse", "720p in 4 steps is twice"),
  "Closer to the result without PARO: `speed` *quality*. Choose your own first frame.",
],
[group("Models", ...models("i2v"), ...encoders)],
[first(MOTION)],
[group("4-step LoRAs", ...loras), group("PARO", ...patches("lora_high", "lora_low"))],
sampling(started, { steps: 4, cfg: 1, shift: 5 }),
[result("wan22_i2v_4_steps")]);

export const WAN = [text, image, fewSteps];
