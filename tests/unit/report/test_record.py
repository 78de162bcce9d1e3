"""What a saved file tells of a run, and what is told where it is opened."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_paro import paro_runtime
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Plan, Site, SitePlan
from comfyui_paro.paro_runtime.report.record import LONGEST, compared, plan_id

H100 = {"precision": "fp8", "gpu": "NVIDIA H100 80GB HBM3", "version": "0.2.0", "torch": "2.11.0", "comfyui": "0.33.0"}
H100 |= {"model": "wan d0d6 b31d", "plan": "1" * 16}


@pytest.mark.parametrize(
    "changes, told",
    [
        ({}, "fp8_all the same here, with the same weights and plan"),
        (
            {"precision": "int8", "gpu": "NVIDIA GeForce RTX 4090", "plan": "2" * 16},
            "fp8_here INT8 on NVIDIA GeForce RTX 4090, pixels may differ",
        ),
        ({"version": "0.3.0"}, "fp8_here PARO 0.3.0, pixels may differ"),
        ({"torch": "2.13.0"}, "torch_here torch 2.13.0, pixels may differ"),
        ({"model": "wan d0d6 c000", "plan": "2" * 16}, "fp8_here other weights, pixels may differ"),
        ({"plan": "2" * 16}, "fp8_here another plan, pixels may differ"),
    ],
)
def test_what_differs_is_named(changes, told):
    kind, ending = told.split("_")
    made = "made with FP8 on NVIDIA H100 80GB HBM3, PARO 0.2.0" + ", torch 2.11.0" * (kind == "torch")
    assert compared(H100, {**H100, **changes}) == f"{made}: {ending}"


def test_a_file_cannot_write_more_than_a_line():
    line = compared({"precision": ["\n" * 9], "gpu": "x" * 10_000 + "\n", "version": "\x1b[31m\n"}, H100)
    assert "\n" not in line and "\x1b" not in line and "x" * LONGEST in line and len(line) < 400
    assert compared({}, H100).startswith("made with unknown on unknown, PARO unknown")


def test_a_plan_is_known_again_without_its_masks_and_from_any_other():
    mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :, 0] = True
    entry = SitePlan.create(["FHW", "HWF"], mask, None, torch.ones(2))
    plan = Plan(ModelIdentity("wan", "a", "b"), TokenLayout(0, (4, 8, 8), 0), 64, {Site("double", 0): entry})
    assert plan_id(plan) == plan_id(plan.without_masks())
    others = [
        replace(plan, identity=ModelIdentity("wan", "a", "c")),
        replace(plan, settings={"tail": "off"}),
        replace(plan, sites={Site("double", 0): replace(entry, orders=("HWF", "FHW"))}),
        replace(plan, sites={Site("double", 0): replace(entry, density=entry.density + 0.01)}),
        replace(plan, sites={Site("double", 0): replace(entry, mass_kept=entry.mass_kept - 0.01)}),
    ]
    assert len({plan_id(plan), *map(plan_id, others)}) == 6


def test_one_version():
    """The one that is written into files is the package's."""
    project = (Path(paro_runtime.__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', project, re.M)[1] == paro_runtime.VERSION
