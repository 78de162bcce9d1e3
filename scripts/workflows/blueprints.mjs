// Blueprints: subgraphs that the page offers beside the nodes. `inputs` and `outputs` are what stands on the outside, in
// order: [name, id of the node within, name of that node's input, widget or output].

import { group, patch, settings } from "./parts.mjs";

const named = (id, ...names) => names.map((name) => [name, id, name]);
// What is connected from outside, and the choices of the node above, where there is one.
const paro = (choices) => ({ ...patch("paro", undefined, "", choices), inputs: choices ? { settings: ["settings", 0] } : {} });

// Titles say nothing of speed: the page's search puts words of a title before the node that this is made of.
export const BLUEPRINTS = [
  {
    name: "PARO model and settings",
    about: "A model made faster by PARO, with the settings that people change. Put it after the loader and LoRAs, before the sampler.",
    columns: [[group("What you chose", settings({}))], [group("What runs", paro(true))]],
    inputs: [...named("paro", "model", "enabled"), ...named("settings", "preset", "density", "precision", "dense_steps")],
    outputs: named("paro", "model"),
  },
  {
    name: "PARO side by side",
    about: "In the place of the sampler: the same seed without PARO and with it, both pictures and how far apart they are.",
    columns: [[group("PARO", paro(false))], [group("Both runs", { id: "compare", type: "PAROCompare", inputs: { model: ["paro", 0] } })]],
    inputs: [
      ...named("paro", "model"), ...named("compare", "positive", "negative", "latent_image", "vae"),
      ...named("paro", "speed", "density", "precision"),
      ...named("compare", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    ],
    outputs: named("compare", "comparison", "report", "dense", "sparse"),
  },
];
