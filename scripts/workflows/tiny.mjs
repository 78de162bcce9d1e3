// What runs without a download, on the tiny model that comes with the pack.

import { group, patch, sampler, settings, workflow } from "./parts.mjs";

const model = group("The model that comes with PARO",
  { id: "model", type: "PARODemoModel" },
  { id: "shift", type: "ModelSamplingSD3", widgets: { shift: 3 }, inputs: { model: ["model", 0] } });
const content = (shape, background) => group("Prompt and size",
  { id: "prompt", type: "PARODemoConditioning", widgets: { shape, direction: "right-down", background } },
  { id: "empty", type: "EmptyHunyuanLatentVideo", widgets: { width: 192, height: 192, length: 29, batch_size: 1 } });
// Its sequences are far below the number of tokens from which PARO gains.
const small = () => settings({ precision: "int8", min_tokens: 0 });
const clip = (id, images) => ({
  id, type: "SaveAnimatedWEBP", height: 390, inputs: { images: [images, 0] },
  widgets: { filename_prefix: `paro/${id}`, fps: 6, lossless: true, quality: 90, method: "default" },
});
const sampled = (id, title, source) => [
  sampler(id, title, { model: [source, 0], positive: ["prompt", 0], negative: ["prompt", 1], latent: ["empty", 0],
    steps: 8, cfg: 1, seeds: "fixed" }),
  { id: `decode_${id}`, type: "PARODemoDecode", inputs: { samples: [id, 0] } },
  clip(`${id}_paro`, `decode_${id}`),
];
const CPU = "On a CPU the plain PyTorch reference computes PARO: right, but slower than without. The speed-up needs a GPU and a long sequence.";

export const demo = workflow("PARO Demo", [
  "PARO on a model that needs no download",
  "A video model of four layers, trained for this pack, draws a moving shape. The same clip is made with PARO and without.",
  "The first step stays dense and calibrates on the way. On a grid as small as this one the preset *balanced* keeps most " +
  "blocks. The same seed always gives the same clip.",
  CPU,
],
[model, content("circle", "flat")],
[group("PARO", small(), patch("paro", undefined, "shift", true),
  { id: "report", type: "PAROReport", height: 400, inputs: { model: ["paro", 0], samples: ["with", 0] } })],
[group("With PARO", ...sampled("with", "KSampler with PARO", "paro"))],
[group("Without", ...sampled("without", "KSampler without PARO", "shift"))]);

export const compare = workflow("PARO Compare", [
  "Is it faster, and is it the same?",
  "**PARO Compare** samples one seed twice, first without PARO and then with it. It shows both, their difference (8 times " +
  "as bright), and says how far they are apart. Nothing has to be downloaded.",
  "In a workflow of your own, put it in the place of the sampler, after **PARO Patch Model**, and connect your VAE.",
  CPU,
],
[model, content("cross", "checker"), group("Decoder", { id: "vae", type: "PARODemoVAE" })],
[group("PARO", small(), patch("paro", undefined, "shift", true))],
[group("Without PARO | with PARO | difference", {
  id: "compare", type: "PAROCompare", height: 830, width: 620,
  widgets: { seed: 0, control_after_generate: "fixed", steps: 8, cfg: 1, sampler_name: "euler", scheduler: "simple", denoise: 1 },
  inputs: { model: ["paro", 0], positive: ["prompt", 0], negative: ["prompt", 1], latent_image: ["empty", 0], vae: ["vae", 0] },
})],
[group("Result", { id: "text", type: "PreviewAny", height: 420, inputs: { source: ["compare", 1] } }, clip("compare_clip", "compare"))]);

export const check = workflow("PARO Check", [
  "Does PARO run here, and how fast?",
  "**PARO Check** says so without sampling. Alone it checks the machine; with a model, a latent and a prompt it checks a run " +
  "of that size: which steps would be sparse, and milliseconds per attention call by PARO and by all else that is installed.",
  "The tiny model that comes with the pack only shows how to connect it. Put your own loader, prompt and empty latent in its " +
  "place; nothing is sampled.",
  "It takes some seconds, on a new machine up to 90 while kernels are compiled. Without an NVIDIA or AMD GPU nothing is " +
  "timed, and the text says what is missing. The output `json` is what to send with a question.",
],
[group("This machine", { id: "machine", type: "PAROCheck", title: "PARO Check: the machine", width: 460, height: 560, widgets: { steps: 20 } })],
[model, content("circle", "flat")],
[group("PARO", small(), patch("paro", undefined, "shift", true))],
[group("A model of yours", { id: "check", type: "PAROCheck", title: "PARO Check: the model", width: 460, height: 560, widgets: { steps: 8 },
  inputs: { model: ["paro", 0], latent: ["empty", 0], positive: ["prompt", 0] } })]);
