// The example workflows: columns of groups of nodes; widgets, links and slots by name. The page stacks the nodes.
// `python scripts/write_workflows.py` turns them into the files of example_workflows/ inside the real page.

import { BLUEPRINTS } from "./workflows/blueprints.mjs";
import { IMAGE } from "./workflows/image.mjs";
import { check, compare, demo } from "./workflows/tiny.mjs";
import { VIDEO } from "./workflows/video.mjs";
import { WAN } from "./workflows/wan.mjs";

export { BLUEPRINTS };

// The pack's own nodes alone, wired as they belong together: the picture of the README.
export const PICTURE = {
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

export const WORKFLOWS = [demo, compare, check, ...WAN, ...VIDEO, ...IMAGE];
