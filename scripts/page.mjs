// Drive ComfyUI's real page in a headless Chromium: build the example workflows, run one, take a picture.
//
//   node scripts/page.mjs build URL FOLDER           writes every workflow of workflows.mjs to FOLDER
//   node scripts/page.mjs blueprints URL FOLDER      writes every blueprint of workflows.mjs to FOLDER
//   node scripts/page.mjs add URL NAME...            adds each blueprint as the page does: what it has outside and within
//   node scripts/page.mjs run URL FILE [OUT [SHOT]]  opens FILE, saves it to OUT as the page would, runs it
//   node scripts/page.mjs open URL FILE...           opens each FILE: unknown, red and overlapping nodes, and errors
//   node scripts/page.mjs shot URL FILE PICTURE      takes a picture of FILE
//   node scripts/page.mjs nodes URL PICTURE          takes a picture of the pack's nodes
//   node scripts/page.mjs prompts URL FILE...        opens each FILE: what the page would send to the server
//   node scripts/page.mjs find URL WORD...           what the page's search offers for each WORD, best first
//   node scripts/page.mjs help URL NODE...           what stands behind the (i) of each kind of node
//   node scripts/page.mjs tell URL FILE [FOLDER]     runs every prompt of FILE (name: API format), tells what the page
//                                                    then says that it did not say before, and which inputs it marks
//
// RENDERER=nodes2 draws by Nodes 2.0, anything else as ComfyUI does by default. SETTINGS is JSON of more settings.
// Needs the npm package playwright-core (found through NODE_PATH as well) and a Chromium (CHROMIUM, or the system's).
// Prints one line of JSON: node types the page does not know, errors, and how the run ended.

import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { BLUEPRINTS, PICTURE, WORKFLOWS } from "./workflows.mjs";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const [command, url, ...rest] = process.argv.slice(2);
const NODES2 = process.env.RENDERER === "nodes2";
// The server keeps settings: every page sets its own.
const SETTINGS = { "Comfy.VueNodes.Enabled": NODES2, "Comfy.Minimap.Visible": false, ...JSON.parse(process.env.SETTINGS ?? "{}") };

async function open() {
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-gpu"],
  });
  const page = await browser.newPage({ viewport: { width: 1800, height: 1300 }, deviceScaleFactor: 1.5 });
  const errors = [];
  page.on("pageerror", (error) => errors.push(error.message));
  // The host's page logs errors of its own: it looks for files that a new user does not have, for models where it may not,
  // and for a help page by language before the one in English.
  page.on("console", (said) => {
    const all = `${said.text()} ${said.location().url}`;
    if (said.type() === "error" && /paro/i.test(all) && !/huggingface\.co|\/docs\/PARO\w+\/en\.md/.test(all)) errors.push(all);
  });
  await enter(page);
  return { browser, page, errors };
}

async function enter(page) {
  await page.goto(url);
  await page.waitForFunction(
    () => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100, null, { timeout: 120000 });
  await page.waitForTimeout(1500);
  await page.keyboard.press("Escape"); // the dialog of templates that greets a new user
  await page.evaluate(async (settings) => {
    for (const [name, value] of Object.entries(settings)) await window.app.extensionManager.setting.set(name, value);
  }, SETTINGS);
  await page.waitForTimeout(500);
}

// Runs in the page: builds a graph from a specification and returns the page's own JSON of it.
function build(spec) {
  const { app, LiteGraph } = window;
  app.graph.clear();
  // Below a node stays room for what Nodes 2.0 draws there: the pack's badge, and "Error" or "Show advanced inputs".
  const made = {}, usual = 330, inset = 28, title = 30, below = 50;
  const all = spec.columns.flat().flatMap((group) => group.nodes);
  for (const { id, type, title, height = 0, width = usual, widgets = {}, models } of all) {
    const node = LiteGraph.createNode(type);
    if (!node) throw new Error(`no node type ${type}`);
    app.graph.add(node);
    node.size = [width, Math.max(height, node.computeSize()[1])];
    if (title) node.title = title;
    if (models) node.properties.models = models;
    for (const [name, value] of Object.entries(widgets)) {
      const widget = node.widgets?.find((w) => w.name === name || (name === "text" && w.name === ""));
      if (!widget) throw new Error(`${type} has no widget ${name}, only ${node.widgets?.map((w) => w.name)}`);
      widget.value = value;
    }
    made[id] = node;
  }
  for (const { id, type, inputs = {} } of all) {
    for (const [name, [source, slot]] of Object.entries(inputs)) {
      const index = made[id].findInputSlot(name);
      if (index < 0) throw new Error(`${type} has no input ${name}`);
      if (!made[source].connect(slot, made[id], index)) throw new Error(`${source} does not fit ${id}.${name}`);
    }
  }
  let x = 0;
  for (const column of spec.columns) {
    let y = 0;
    const width = Math.max(...column.flatMap((group) => group.nodes).map((node) => node.width ?? usual));
    for (const { title: name, nodes } of column) {
      const group = new LiteGraph.LGraphGroup(name), top = y;
      y += title + inset;
      for (const { id } of nodes) {
        made[id].pos = [x + inset, y + title];
        y += title + made[id].size[1] + below;
      }
      group.pos = [x, top];
      group.size = [width + 2 * inset, y - top];
      app.graph.add(group);
      y += 2 * inset;
    }
    x += width + 4 * inset;
  }
  return app.graph.serialize();
}

// Runs in the page, after `build`: makes one subgraph of its nodes, and returns the file that the page would publish of it.
async function wrap({ name, about, columns, inputs, outputs }) {
  const { app } = window, nodes = [...app.graph.nodes];
  const ids = columns.flat().flatMap((group) => group.nodes).map(({ id }) => id);
  const places = new Map(ids.map((id, n) => [id, nodes[n].pos.join()]));
  for (const group of [...app.graph.groups]) app.graph.remove(group);
  const { subgraph, node } = app.graph.convertToSubgraph(new Set(nodes));
  // The nodes within are copies.
  const within = (id) => subgraph.nodes.find((copy) => copy.pos.join() === places.get(id));
  for (const input of [...subgraph.inputs]) subgraph.removeInput(input); // the page brings some outside by itself, such as seeds
  for (const [label, id, slot] of inputs) {
    const inner = within(id), input = inner.inputs.find((input) => input.name === slot);
    const made = subgraph.addInput(label, String(input.type)), shown = inner.widgets?.find((widget) => widget.name === slot)?.label;
    if (shown && shown !== slot) made.label = shown;
    made.connect(input, inner);
  }
  for (const [label, id, slot] of outputs) {
    const inner = within(id), output = inner.outputs.find((output) => output.name === slot);
    subgraph.addOutput(label, String(output.type)).connect(output, inner);
  }
  await new Promise((done) => setTimeout(done, 1000));
  subgraph.name = node.title = name;
  node.size = [330, node.computeSize()[1]];
  const left = Math.min(...subgraph.nodes.map((inner) => inner.pos[0])), right = Math.max(...subgraph.nodes.map((inner) => inner.pos[0] + inner.size[0]));
  const [, top] = subgraph.nodes[0].pos;
  subgraph.inputNode.pos = [left - 260, top];
  subgraph.outputNode.pos = [right + 130, top];
  const { nodes: outer, subgraphs } = app.canvas._serializeItems([node]);
  outer[0].pos = [0, 0];
  return { revision: 0, last_node_id: outer[0].id, last_link_id: 0, nodes: outer, links: [], version: 0.4,
    definitions: { subgraphs }, extra: { BlueprintDescription: about } };
}

// The file of a blueprint, the same every time: ids that the page draws at random follow from the name, and the names that
// a language gives to inputs are left out, as the page leaves them out of workflows.
function settled(json, name) {
  const text = JSON.stringify(json, (key, value) => (key === "localized_name" ? undefined : value), 2), ids = new Map();
  return text.replace(/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/g, (id) => {
    if (!ids.has(id)) {
      const hex = createHash("sha256").update(`${name} ${ids.size}`).digest("hex");
      ids.set(id, `${hex.slice(0, 8)}-${hex.slice(8, 12)}-4${hex.slice(13, 16)}-8${hex.slice(17, 20)}-${hex.slice(20, 32)}`);
    }
    return ids.get(id);
  }) + "\n";
}

async function load(page, path) {
  await page.evaluate((json) => window.app.loadGraphData(json), JSON.parse(readFileSync(path, "utf8")));
  await page.waitForTimeout(1000);
  return page.evaluate(() => {
    const known = window.LiteGraph.registered_node_types;
    return window.app.graph.nodes.map((n) => n.type).filter((type) => !(type in known));
  });
}

// Titles of the nodes that the page draws red: unknown ones, and those whose files are not there.
function red(page) {
  return page.evaluate(() => window.app.graph.nodes.filter((node) => node.has_errors).map((node) => node.title));
}

// Pairs of titles of nodes that lie over each other, by the sizes that the page draws; a node's title is above its place.
function overlaps(page) {
  return page.evaluate((nodes2) => {
    const elements = nodes2 ? new Map([...document.querySelectorAll("[data-node-id]")].map((e) => [e.dataset.nodeId, e])) : null;
    const boxes = window.app.graph.nodes.map((node) => {
      if (nodes2) {
        const box = elements.get(String(node.id)).getBoundingClientRect();
        return { title: node.title, left: box.left, top: box.top, right: box.right, bottom: box.bottom };
      }
      const [width, height] = [0, 1].map((axis) => Math.max(node.size[axis], axis ? node.computeSize()[1] : 0));
      return { title: node.title, left: node.pos[0], top: node.pos[1] - 30, right: node.pos[0] + width, bottom: node.pos[1] + height };
    });
    const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => meet(a, b)).map((b) => [a.title, b.title]));
  }, NODES2);
}

async function run(page) {
  return await page.evaluate(
    () =>
      new Promise((resolve) => {
        const on = (kind, how) => window.app.api.addEventListener(kind, (e) => resolve({ how, ...how === "error" && { message: e.detail.exception_message } }));
        on("execution_success", "success");
        on("execution_error", "error");
        on("execution_interrupted", "interrupted");
        setTimeout(() => resolve({ how: "timeout" }), 240000);
        window.app.queuePrompt(0).then((queued) => queued === false && resolve({ how: "refused" }));
      }),
  );
}

// All that a user can read on the page, with what opens behind "View details"; the nodes are drawn within the window.
async function read(page) {
  await page.evaluate(() => {
    const { canvas, graph } = window.app;
    graph.nodes.forEach((node, n) => (node.pos = [(n % 4) * 480, Math.floor(n / 4) * 560]));
    canvas.ds.scale = 0.5;
    canvas.ds.offset = [120, 160];
    canvas.setDirty(true, true);
  });
  await page.waitForTimeout(1000);
  const details = page.getByRole("button", { name: "View details" }).last();
  const first = await page.evaluate(() => document.body.innerText);
  if (!(await details.count())) return first;
  await details.click();
  await page.waitForTimeout(1000);
  return first + "\n" + await page.evaluate(() => document.body.innerText);
}

async function tell(page, prompts, folder) {
  const told = {};
  for (const [name, prompt] of Object.entries(prompts)) {
    await enter(page);
    await page.evaluate((json) => (window.app.graph.clear(), window.app.loadApiJson(json, "mistake")), prompt);
    const before = new Set((await read(page)).split("\n"));
    await run(page);
    await page.waitForTimeout(1500);
    const text = (await read(page)).split("\n").filter((line) => !before.has(line));
    const marks = await page.evaluate(() => window.app.graph.nodes.flatMap((node) =>
      (node.inputs ?? []).filter((input) => input.hasErrors).map((input) => input.name)));
    told[name] = { text, marks };
    if (folder) await page.screenshot({ path: join(folder, `${Object.keys(told).length}.png`) });
  }
  return told;
}

// The whole graph on the page's canvas, clear of the page's own buttons; where it lies there.
function fit(page) {
  return page.evaluate(() => {
    const { canvas, graph } = window.app;
    const boxes = [...graph.nodes, ...graph.groups];
    const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map((b) => b.pos[axis])));
    const [right, bottom] = [0, 1].map((axis) => Math.max(...boxes.map((b) => b.pos[axis] + b.size[axis])));
    const scale = Math.min(1, 1500 / (right - left), 1050 / (bottom - top));
    canvas.ds.scale = scale;
    canvas.ds.offset = [140 / scale - left, 120 / scale - top];
    canvas.setDirty(true, true);
    return { width: (right - left) * scale, height: (bottom - top) * scale };
  });
}

async function shot(page, path) {
  const box = await fit(page);
  await page.waitForTimeout(1500);
  await page.screenshot({ path, clip: { x: 130, y: 110, width: box.width + 20, height: box.height + 20 } });
}

// Titles of what the search dialog lists, best first.
async function find(page, word, after = "Escape") {
  const { width, height } = page.viewportSize(), field = page.getByPlaceholder("Add a node");
  for (let tries = 0; tries < 5 && !(await field.isVisible()); tries++) { // the canvas takes no clicks while it starts
    await page.mouse.dblclick(width / 2, height * 0.8);
    await page.waitForTimeout(1500);
  }
  await field.fill(word);
  await page.waitForTimeout(1000);
  const found = await page.getByRole("option").evaluateAll((all) => all.map((option) => option.innerText.split("\n")[0]));
  await page.keyboard.press(after);
  await page.waitForTimeout(500);
  return found.slice(0, 10);
}

// Adds a blueprint as a user does: searches for it, takes the first that is found, and puts it down. What it has.
async function add(page, name) {
  await page.evaluate(() => window.app.graph.clear());
  const [first] = await find(page, name, "Enter");
  if (first !== name) return null;
  const { width, height } = page.viewportSize();
  await page.mouse.click(width / 2, height / 2);
  await page.waitForTimeout(1500);
  return page.evaluate(() => window.app.graph.nodes.map((node) => ({ title: node.title, inputs: node.inputs.map((input) => input.name),
    outputs: node.outputs.map((output) => output.name), widgets: node.widgets.map((widget) => widget.name),
    within: node.subgraph?.nodes.map((inner) => inner.type) })));
}

// Text of the panel that opens from the button (i) above a selected node.
async function help(page, type) {
  await page.evaluate((type) => {
    const { canvas, graph } = window.app, node = window.LiteGraph.createNode(type);
    graph.clear();
    node.pos = [400, 300];
    graph.add(node);
    canvas.ds.scale = 1;
    canvas.ds.offset = [0, 0];
    canvas.selectNode(node);
    canvas.setDirty(true, true);
  }, type);
  const before = new Set((await page.evaluate(() => document.body.innerText)).split("\n"));
  await page.getByTestId("info-button").click();
  // The panel loads its page: every one has a table, whose cells the text divides by tabs.
  let found = [];
  for (let tries = 0; tries < 20 && !found.some((line) => line.includes("\t")); tries++) {
    await page.waitForTimeout(750);
    const text = await page.evaluate(() => document.body.innerText);
    found = text.split("\n").filter((line) => line.trim() && !before.has(line));
  }
  return found;
}

const { browser, page, errors } = await open();
const result = { errors };
try {
  if (command === "build") {
    for (const spec of WORKFLOWS) {
      // The page remembers widget values by node number: every graph needs a page of its own.
      await enter(page);
      const json = await page.evaluate(build, spec);
      writeFileSync(join(rest[0], `${spec.name}.json`), JSON.stringify(json, null, 2) + "\n");
    }
  } else if (command === "blueprints") {
    for (const spec of BLUEPRINTS) {
      await enter(page);
      await page.evaluate(build, spec);
      writeFileSync(join(rest[0], `${spec.name}.json`), settled(await page.evaluate(wrap, spec), spec.name));
    }
  } else if (command === "add") {
    result.added = {};
    for (const name of rest) result.added[name] = await add(page, name);
  } else if (command === "tell") {
    result.told = await tell(page, JSON.parse(readFileSync(rest[0], "utf8")), rest[1]);
  } else if (command === "nodes") {
    await page.evaluate(build, PICTURE);
    await shot(page, rest[0]);
  } else if (command === "find" || command === "help") {
    result.found = {};
    for (const word of rest) result.found[word] = await (command === "find" ? find : help)(page, word);
  } else if (command === "prompts") {
    result.prompts = {};
    for (const path of rest) {
      await load(page, path);
      result.prompts[path] = await page.evaluate(async () => (await window.app.graphToPrompt()).output);
    }
  } else if (command === "open") {
    result.opened = {};
    for (const path of rest) {
      const before = errors.length, missing = await load(page, path);
      await fit(page);
      await page.waitForTimeout(1000);
      result.opened[path] = { missing, red: await red(page), overlaps: await overlaps(page), errors: errors.slice(before) };
    }
  } else {
    result.missing = await load(page, rest[0]);
    if (command === "shot") await shot(page, rest[1]);
    if (command === "run") {
      const saved = await page.evaluate(() => window.app.graph.serialize());
      if (rest[1]) writeFileSync(rest[1], JSON.stringify(saved, null, 2) + "\n");
      result.run = await run(page);
      await page.waitForTimeout(2000);
      if (rest[2]) await shot(page, rest[2]);
    }
  }
} finally {
  await browser.close();
}
console.log(JSON.stringify(result));
