// The example workflows: columns of groups of nodes; widgets, links and slots by name. The page stacks the nodes.
// `node scripts/page.mjs build URL` turns them into the JSON files of example_workflows/ inside the real page.

const HUB = "https://huggingface.co/";
const WAN = HUB + "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/";
const WAN21 = HUB + "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/";
const FLUX_TEXT = HUB + "comfyanonymous/flux_text_encoders/resolve/main/";

const model = (url, directory) => [{ name: url.split("/").pop(), url, directory }];
const file = (url) => url.split("/").pop();

const note = (height, text) => ({ id: "about", type: "MarkdownNote", height, widgets: { text } });

const sampler = (id, title, model, steps, cfg, seeds, inputs) => ({
  id, type: "KSampler", title,
  widgets: { seed: 0, control_after_generate: seeds, steps, cfg, sampler_name: "euler", scheduler: "simple", denoise: 1 },
  inputs: { model: [model, 0], ...inputs },
});
const patch = (id, title, model) => ({
  id, type: "PAROPatchModel", title, height: 300,
  widgets: { enabled: true, plan_file: "auto" },
  inputs: { model: [model, 0], settings: ["settings", 0] },
});

const demoSampler = (id, title, model) =>
  sampler(id, title, model, 8, 1, "fixed", { positive: ["prompt", 0], negative: ["prompt", 1], latent_image: ["empty", 0] });
const demoClip = (id, samples) => [
  { id: `decode_${id}`, type: "PARODemoDecode", inputs: { samples: [samples, 0] } },
  { id: `save_${id}`, type: "SaveAnimatedWEBP", height: 390,
    widgets: { filename_prefix: `paro/${id}`, fps: 6, lossless: true, quality: 90, method: "default" },
    inputs: { images: [`decode_${id}`, 0] } },
];

const demo = {
  name: "paro_demo_tiny_model",
  columns: [
    [
      { title: "The model that comes with PARO", nodes: [
        { id: "model", type: "UNETLoader", widgets: { unet_name: "paro-tiny-wan.safetensors", weight_dtype: "default" } },
        { id: "shift", type: "ModelSamplingSD3", widgets: { shift: 3 }, inputs: { model: ["model", 0] } },
        { id: "prompt", type: "PARODemoConditioning",
          widgets: { shape: "circle", direction: "right-down", background: "flat" } },
        { id: "empty", type: "EmptyHunyuanLatentVideo", widgets: { width: 192, height: 192, length: 29, batch_size: 1 } },
      ] },
      { title: "About", nodes: [note(300,
        "## PARO on a model that needs no download\n\nA video model of four layers, trained for this pack, draws a " +
        "moving shape. The same clip is made with and without PARO.\n\nEvery run calibrates on the way, in its " +
        "last dense step: the same seed always gives the same clip, whatever ran before.\n\nOn a " +
        "CPU the plain PyTorch reference computes everything: right, but not fast. The speed-up needs a GPU and a " +
        "long sequence.")] },
    ],
    [
      { title: "PARO", nodes: [
        { id: "settings", type: "PAROSettings", height: 450,
          widgets: { preset: "custom", density: 0.3, precision: "int8", dense_steps: 3, min_tokens: 0 } },
        patch("paro", undefined, "shift"),
        { id: "report", type: "PAROReport", height: 330, inputs: { model: ["paro", 0], samples: ["with", 0] } },
      ] },
    ],
    [{ title: "With PARO", nodes: [demoSampler("with", "KSampler with PARO", "paro"), ...demoClip("with_paro", "with")] }],
    [
      { title: "Without", nodes: [
        demoSampler("without", "KSampler without PARO", "shift"), ...demoClip("without_paro", "without"),
      ] },
      { title: "What PARO did", nodes: [{ id: "text", type: "PreviewAny", height: 260, inputs: { source: ["report", 0] } }] },
    ],
  ],
};

const compare = {
  name: "paro_compare_tiny_model",
  columns: [
    [
      { title: "The model that comes with PARO", nodes: [
        { id: "model", type: "UNETLoader", widgets: { unet_name: "paro-tiny-wan.safetensors", weight_dtype: "default" } },
        { id: "shift", type: "ModelSamplingSD3", widgets: { shift: 3 }, inputs: { model: ["model", 0] } },
        { id: "prompt", type: "PARODemoConditioning",
          widgets: { shape: "cross", direction: "right-down", background: "checker" } },
        { id: "empty", type: "EmptyHunyuanLatentVideo", widgets: { width: 192, height: 192, length: 29, batch_size: 1 } },
        { id: "vae", type: "PARODemoVAE" },
      ] },
    ],
    [
      { title: "PARO", nodes: [
        { id: "settings", type: "PAROSettings",
          widgets: { preset: "custom", density: 0.3, precision: "int8", dense_steps: 3, min_tokens: 0 } },
        patch("paro", undefined, "shift"),
      ] },
      { title: "About", nodes: [note(300,
        "## Is it faster, and is it the same?\n\n**PARO Compare** samples one seed twice, first without PARO and then " +
        "with it. It shows both, their difference (8 times as bright), and says how far they are apart.\n\nIn a " +
        "workflow of your own, put it in the place of the sampler, after **PARO Patch Model**, and connect your VAE." +
        "\n\nOn a CPU the plain PyTorch reference computes PARO: right, but slower than without. The speed-up needs a GPU " +
        "and a long sequence.")] },
    ],
    [{ title: "Without PARO | with PARO | difference", nodes: [
      { id: "compare", type: "PAROCompare", height: 830, width: 620,
        widgets: { seed: 0, control_after_generate: "fixed", steps: 8, cfg: 1, sampler_name: "euler", scheduler: "simple", denoise: 1 },
        inputs: { model: ["paro", 0], positive: ["prompt", 0], negative: ["prompt", 1], latent_image: ["empty", 0], vae: ["vae", 0] } },
    ] }],
    [{ title: "Result", nodes: [
      { id: "text", type: "PreviewAny", height: 420, inputs: { source: ["compare", 1] } },
      { id: "save", type: "SaveAnimatedWEBP", height: 330,
        widgets: { filename_prefix: "paro/compare", fps: 6, lossless: true, quality: 90, method: "default" },
        inputs: { images: ["compare", 0] } },
    ] }],
  ],
};

const wanSampler = (id, title, model, latent, values) => ({
  id, type: "KSamplerAdvanced", title,
  widgets: { noise_seed: 0, steps: 20, cfg: 3.5, sampler_name: "euler", scheduler: "simple", ...values },
  inputs: { model: [model, 0], positive: ["positive", 0], negative: ["negative", 0], latent_image: [latent, 0] },
});
const wanModel = (id, title, name) => ({
  id, type: "UNETLoader", title, widgets: { unet_name: name, weight_dtype: "default" },
  models: model(`${WAN}diffusion_models/${name}`, "diffusion_models"),
});
const shift = (id, source) => ({ id, type: "ModelSamplingSD3", widgets: { shift: 8 }, inputs: { model: [source, 0] } });

const wan = {
  name: "paro_wan22_14b_t2v",
  columns: [
    [
      { title: "Models", nodes: [
        wanModel("high", "High noise model", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"),
        wanModel("low", "Low noise model", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"),
        { id: "clip", type: "CLIPLoader",
          widgets: { clip_name: "umt5_xxl_fp8_e4m3fn_scaled.safetensors", type: "wan", device: "default" },
          models: model(WAN21 + "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders") },
        { id: "vae", type: "VAELoader", widgets: { vae_name: "wan_2.1_vae.safetensors" },
          models: model(WAN + "vae/wan_2.1_vae.safetensors", "vae") },
      ] },
      { title: "Prompt and size", nodes: [
        { id: "positive", type: "CLIPTextEncode", title: "Positive prompt", height: 150, inputs: { clip: ["clip", 0] },
          widgets: { text: "A lighthouse on a rocky coast at dusk, waves breaking below, the camera slowly circles it" } },
        { id: "negative", type: "CLIPTextEncode", title: "Negative prompt", height: 110, inputs: { clip: ["clip", 0] },
          widgets: { text: "blurry, low quality, distorted, static, subtitles, watermark" } },
        { id: "empty", type: "EmptyHunyuanLatentVideo", widgets: { width: 1280, height: 720, length: 81, batch_size: 1 } },
      ] },
    ],
    [
      { title: "PARO", nodes: [
        { id: "settings", type: "PAROSettings", height: 450, widgets: { preset: "balanced" } },
        patch("paro_high", "PARO Patch Model (high noise)", "high"),
        patch("paro_low", "PARO Patch Model (low noise)", "low"),
      ] },
      { title: "About", nodes: [note(330,
        "## Wan 2.2 14B with PARO\n\nEach of the two models has its own **PARO Patch Model**: they are calibrated " +
        "apart. Both share one **PARO Settings**.\n\nEvery run calibrates on the way, on its own prompt and seed. The status line on each node says what happened." +
        "\n\nLoRAs go between loader and PARO. To compare, switch `enabled` off.")] },
    ],
    [
      { title: "High noise steps", nodes: [
        shift("shift_high", "paro_high"),
        wanSampler("first", "High noise steps", "shift_high", "empty", { add_noise: "enable",
          control_after_generate: "randomize", start_at_step: 0, end_at_step: 10, return_with_leftover_noise: "enable" }),
      ] },
      { title: "Low noise steps", nodes: [
        shift("shift_low", "paro_low"),
        wanSampler("second", "Low noise steps", "shift_low", "first", { add_noise: "disable",
          control_after_generate: "fixed", start_at_step: 10, end_at_step: 10000, return_with_leftover_noise: "disable" }),
      ] },
    ],
    [
      { title: "Video", nodes: [
        { id: "decode", type: "VAEDecode", inputs: { samples: ["second", 0], vae: ["vae", 0] } },
        { id: "video", type: "CreateVideo", widgets: { fps: 16 }, inputs: { images: ["decode", 0] } },
        { id: "save", type: "SaveVideo", height: 380, inputs: { video: ["video", 0] },
          widgets: { filename_prefix: "video/paro_wan22", format: "auto", codec: "auto" } },
      ] },
    ],
  ],
};

const flux = {
  name: "paro_flux1_dev",
  columns: [
    [
      { title: "Models", nodes: [
        { id: "model", type: "UNETLoader", widgets: { unet_name: "flux1-dev.safetensors", weight_dtype: "default" },
          models: model(HUB + "Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors", "diffusion_models") },
        { id: "clip", type: "DualCLIPLoader", widgets: { clip_name1: "clip_l.safetensors",
          clip_name2: "t5xxl_fp16.safetensors", type: "flux", device: "default" },
          models: ["clip_l.safetensors", "t5xxl_fp16.safetensors"].flatMap((name) => model(FLUX_TEXT + name, "text_encoders")) },
        { id: "vae", type: "VAELoader", widgets: { vae_name: "ae.safetensors" },
          models: model(HUB + "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors", "vae") },
      ] },
      { title: "Prompt and size", nodes: [
        { id: "positive", type: "CLIPTextEncode", title: "Prompt", height: 150, inputs: { clip: ["clip", 0] },
          widgets: { text: "A market street in the rain at night, neon signs reflected in puddles, 35 mm photograph" } },
        { id: "guidance", type: "FluxGuidance", widgets: { guidance: 3.5 }, inputs: { conditioning: ["positive", 0] } },
        { id: "negative", type: "ConditioningZeroOut", inputs: { conditioning: ["positive", 0] } },
        { id: "empty", type: "EmptySD3LatentImage", widgets: { width: 1536, height: 1536, batch_size: 1 } },
      ] },
    ],
    [
      { title: "PARO", nodes: [
        { id: "settings", type: "PAROSettings", height: 450, widgets: { preset: "balanced" } }, patch("paro", undefined, "model"),
      ] },
      { title: "About", nodes: [note(260,
        "## Flux 1 with PARO\n\nText tokens and Kontext references are never reordered and never dropped; only the " +
        "image's own tokens are.\n\nAttention is a small share of an image at 1024 x 1024, so expect little there; " +
        "the share grows with the size. This workflow asks for 1536 x 1536.")] },
    ],
    [
      { title: "Image", nodes: [
        sampler("sample", undefined, "paro", 20, 1, "randomize",
          { positive: ["guidance", 0], negative: ["negative", 0], latent_image: ["empty", 0] }),
        { id: "decode", type: "VAEDecode", inputs: { samples: ["sample", 0], vae: ["vae", 0] } },
        { id: "save", type: "SaveImage", height: 420, widgets: { filename_prefix: "paro_flux1" }, inputs: { images: ["decode", 0] } },
      ] },
    ],
  ],
};

// The pack's own nodes alone, wired as they belong together: the picture of the README.
const nodes = {
  name: "nodes",
  columns: [
    [{ title: "What you chose", nodes: [{ id: "settings", type: "PAROSettings" }] }],
    [{ title: "What runs", nodes: [
      { id: "paro", type: "PAROPatchModel", height: 190, inputs: { settings: ["settings", 0] } },
      { id: "report", type: "PAROReport", inputs: { model: ["paro", 0] } },
    ] }],
    [{ title: "If you want a plan of your own", nodes: [
      { id: "calibrate", type: "PAROCalibrate", inputs: { settings: ["settings", 0] } },
    ] }],
  ],
};

export const WORKFLOWS = [demo, compare, wan, flux];
export const PICTURE = nodes;
