"""Calibrations that were interrupted, and what is left of them on disk."""

import random

import pytest
import torch
from comfyui_paro.paro_runtime.calibration import checkpoint as partial_module
from comfyui_paro.paro_runtime.calibration.calibrator import Calibrator
from comfyui_paro.paro_runtime.plan import file as plan_file_module
from comfyui_paro.paro_runtime.plan.file import file_digest, load_plan
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Plan, PlanError, Site
from comfyui_paro.tests.mutated_plans import IDENTITY, LAYOUT, OPTIONS, same
from safetensors import safe_open
from safetensors.torch import save_file


class StoppedError(Exception):
    pass


def feed(calibrator: Calibrator, prompts: int = 2, steps: int = 2) -> None:
    for prompt in range(prompts):
        calibrator.prompt = prompt
        for step in range(steps):
            for index in range(2):
                generator = torch.Generator().manual_seed(100 * prompt + 10 * step + index)
                q, k, v = torch.randn(3, 1, 2, LAYOUT.length, 32, generator=generator)
                calibrator.observe(Site("double", index), LAYOUT, q, k, v, step=step)


def test_stopping_at_any_moment_leaves_what_a_resumption_completes(tmp_path, monkeypatch):
    """Twenty interruptions: while writing, before the rename, between sites. Nothing left behind reads as a plan."""
    whole = Calibrator(IDENTITY, OPTIONS)
    feed(whole)
    expected = whole.plan({"by": "test"})
    chance, real = random.Random(0), plan_file_module.save_file
    for number in range(20):
        folder, stop_at = tmp_path / str(number), chance.randrange(8)
        calls = 0

        def save(tensors, path, metadata, stop_at=stop_at):
            nonlocal calls
            if calls == stop_at:
                kind = chance.randrange(3)
                if kind:
                    real(tensors, path, metadata=metadata)
                if kind == 1:
                    path.write_bytes(path.read_bytes()[: chance.randrange(200)])
                raise StoppedError
            calls += 1
            real(tensors, path, metadata=metadata)

        monkeypatch.setattr(plan_file_module, "save_file", save)
        with pytest.raises(StoppedError):
            feed(Calibrator(IDENTITY, OPTIONS, partial=folder))
        for path in folder.iterdir():
            with pytest.raises(PlanError):
                load_plan(path)
        monkeypatch.setattr(plan_file_module, "save_file", real)
        resumed = Calibrator(IDENTITY, OPTIONS, partial=folder)
        assert resumed.observations == stop_at
        feed(resumed)
        plan = resumed.plan({"by": "test"})
        assert same(Plan(**{**plan.__dict__, "made": {}}), Plan(**{**expected.__dict__, "made": {}}))
        resumed.forget_partial()
        assert not folder.exists()


def test_a_damaged_part_is_observed_again_and_a_foreign_folder_refused(tmp_path):
    calibrator = Calibrator(IDENTITY, OPTIONS, partial=tmp_path / "c")
    feed(calibrator, prompts=1)
    assert calibrator.has(0, {0, 1}) and not calibrator.has(1, {0})
    path = next((tmp_path / "c").glob("*.sums"))
    path.write_bytes(path.read_bytes()[:-50])
    assert len(Calibrator(IDENTITY, OPTIONS, partial=tmp_path / "c").sites) == 1
    with pytest.raises(PlanError, match="another model"):
        Calibrator(ModelIdentity("wan", "other", "x"), OPTIONS, partial=tmp_path / "c")


def test_sums_that_hold_what_this_version_does_not_know_are_observed_again(tmp_path):
    """As those of a version that also summed how attention falls off with distance."""
    feed(Calibrator(IDENTITY, OPTIONS, partial=tmp_path / "c"), prompts=1)
    path = next((tmp_path / "c").glob("*.sums"))
    with safe_open(path, framework="pt") as file:
        text = file.metadata()[partial_module.KEY]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    for more, sites in (({}, 2), ({"falloff": torch.ones(2, 17)}, 1)):
        found = tensors | more
        save_file(found, path, metadata={partial_module.KEY: text, partial_module.DIGEST: file_digest(text, found)})
        assert len(Calibrator(IDENTITY, OPTIONS, partial=tmp_path / "c").sites) == sites


def test_mutated_sums_are_observed_again(tmp_path):
    """Half of the mutations of a file leave its sums plausible."""
    feed(Calibrator(IDENTITY, OPTIONS, partial=tmp_path / "c"), prompts=1)
    path = next((tmp_path / "c").glob("*.sums"))
    data, chance = path.read_bytes(), random.Random(0)
    sites = len(list((tmp_path / "c").glob("*.sums")))
    for number in range(60):
        at = chance.randrange(200, len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :])
        try:
            found = len(Calibrator(IDENTITY, OPTIONS, partial=tmp_path / "c").sites)
        except PlanError:
            continue  # the header names another calibration
        assert found == sites - 1, number
    path.write_bytes(data)
    assert len(Calibrator(IDENTITY, OPTIONS, partial=tmp_path / "c").sites) == sites
