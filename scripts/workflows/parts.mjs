// The pieces that the workflows share. A node is {id, type, title, width, height, widgets, inputs, models}: widgets and
// inputs go by name, an input is [id of the source, number of its output]; models are what the page offers to download.

const HUB = "https://huggingface.co/";
const nameOf = (url) => url.split("/").pop();

export const hub = (repository) => (path) => `${HUB}${repository}/resolve/main/${path}`;

// A node that loads files: `files` maps its widgets to addresses, `directory` is their folder in models/.
export const loader = (id, type, directory, files, { title, widgets = {}, inputs = {} } = {}) => ({
  id, type, title, inputs,
  widgets: { ...Object.fromEntries(Object.entries(files).map(([name, url]) => [name, nameOf(url)])), ...widgets },
  models: Object.values(files).map((url) => ({ name: nameOf(url), url, directory })),
});
export const unet = (id, url, title) =>
  loader(id, "UNETLoader", "diffusion_models", { unet_name: url }, { title, widgets: { weight_dtype: "default" } });
export const clip = (url, type) =>
  loader("clip", "CLIPLoader", "text_encoders", { clip_name: url }, { widgets: { type, device: "default" } });
export const dualClip = (first, second, type) =>
  loader("clip", "DualCLIPLoader", "text_encoders", { clip_name1: first, clip_name2: second },
    { widgets: { type, device: "default" } });
export const vae = (url, id = "vae", title = undefined) => loader(id, "VAELoader", "vae", { vae_name: url }, { title });
export const lora = (id, url, source, title, strength = 1) =>
  loader(id, "LoraLoaderModelOnly", "loras", { lora_name: url },
    { title, widgets: { strength_model: strength }, inputs: { model: [source, 0] } });

export const prompt = (id, title, text, height = 150) =>
  ({ id, type: "CLIPTextEncode", title, height, widgets: { text }, inputs: { clip: ["clip", 0] } });
export const size = (type, widgets) => ({ id: "empty", type, widgets: { ...widgets, batch_size: 1 } });
export const picture = (id, title) => ({ id, type: "LoadImage", title, height: 330, widgets: { image: "example.png" } });
export const shift = (id, type, value, source) => ({ id, type, widgets: { shift: value }, inputs: { model: [source, 0] } });

export const settings = (widgets) => ({ id: "settings", type: "PAROSettings", widgets: { preset: "balanced", ...widgets } });
// With `shared` the choices come from the node above: only where a workflow needs more of them than the node itself has.
export const patch = (id, title, source, shared) => ({
  id, type: "PAROPatchModel", title, height: 290, widgets: { enabled: true, plan_file: "auto" },
  inputs: { model: [source, 0], ...shared && { settings: ["settings", 0] } },
});

// model, positive, negative and latent are [id, output]; steps, cfg and, where they are not the usual ones, the rest.
export const sampler = (id, title, { model, positive, negative, latent, seeds = "randomize", ...widgets }) => ({
  id, type: "KSampler", title,
  widgets: { seed: 0, control_after_generate: seeds, sampler_name: "euler", scheduler: "simple", denoise: 1, ...widgets },
  inputs: { model, positive, negative, latent_image: latent },
});

export const decode = (samples) => ({ id: "decode", type: "VAEDecode", inputs: { samples: [samples, 0], vae: ["vae", 0] } });
export const saveImage = (prefix) =>
  ({ id: "save", type: "SaveImage", height: 420, widgets: { filename_prefix: `paro/${prefix}` }, inputs: { images: ["decode", 0] } });
export const saveVideo = (prefix, fps, audio) => [
  { id: "video", type: "CreateVideo", widgets: { fps }, inputs: { images: ["decode", 0], ...audio && { audio } } },
  { id: "save", type: "SaveVideo", height: 380, inputs: { video: ["video", 0] },
    widgets: { filename_prefix: `paro/${prefix}`, format: "auto", codec: "auto" } },
];

// What has to be downloaded, by the folder it belongs in; one line a file.
function downloads(columns) {
  const models = columns.flat().flatMap((group) => group.nodes).flatMap((node) => node.models ?? []);
  const lines = models.map(({ name, url, directory }) =>
    `- \`${directory}\`: **${name}** from ${url.slice(HUB.length).split("/resolve/")[0]}`);
  return lines.length ? ["### Models", "ComfyUI offers to download what is missing. Folders are those in `models`.",
    [...new Set(lines)].join("\n")] : [];
}

// A workflow with a note in the first column; `about` is its paragraphs, the first the title.
export function workflow(name, about, ...columns) {
  const [title, ...paragraphs] = about;
  const text = [`## ${title}`, ...paragraphs, ...downloads(columns)].join("\n\n");
  const rows = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / 68)), 0);
  const note = { id: "about", type: "MarkdownNote", title: "About this workflow", width: 420, height: 80 + 14 * rows, widgets: { text } };
  return { name, columns: [[{ title: "Read this first", nodes: [note] }], ...columns] };
}
export const group = (title, ...nodes) => ({ title, nodes });
