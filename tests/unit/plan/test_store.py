"""Folders of plans: what is listed, found and refused by its name."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from comfyui_paro.paro_runtime.plan import file as plan_file_module
from comfyui_paro.paro_runtime.plan.file import save_plan
from comfyui_paro.paro_runtime.plan.options import MaskOptions
from comfyui_paro.paro_runtime.plan.plan import Plan, PlanError
from comfyui_paro.paro_runtime.plan.store import PlanStore, automatic_name
from comfyui_paro.tests.mutated_plans import make_plan, same

ASKED = MaskOptions(0.4, "mass", "shared", 64)


def kept(tmp_path, **changes) -> tuple[PlanStore, Plan]:
    """A store with one plan, whose settings are ASKED' but for `changes`."""
    store, plan = PlanStore([], tmp_path), make_plan(1)
    plan = replace(plan, settings={**ASKED.as_dict(), **changes})
    store.save(plan, automatic_name(replace(plan, settings=ASKED.as_dict())))
    return store, plan


def found(store: PlanStore, plan: Plan):
    return store.find(plan.identity, plan.layout, plan.block_q, ASKED)


def test_a_plan_that_was_given_another_ones_name_is_refused(tmp_path):
    store, plan = kept(tmp_path)
    assert found(store, plan)[0] is not None
    store, plan = kept(tmp_path, density=0.2)
    assert found(store, plan) == (None, f"plan {store.names()[0]}: was made with other settings than its name says")


def test_a_folder_that_may_not_be_read_holds_no_plans(tmp_path, monkeypatch, caplog):
    """A shared machine, a network drive. Whoever may do anything is refused nothing, so it is pretended."""
    store, plan = kept(tmp_path)
    name = store.names()[0]

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    for module, function in ((os, "scandir"), (Path, "is_file")):
        monkeypatch.setattr(module, function, refused)
    assert store.names() == [] and "Permission denied" in caplog.text
    plan_found, reason = found(store, plan)
    assert plan_found is None and "cannot be read (Permission denied)" in reason
    with pytest.raises(PlanError, match=r"cannot be read \(Permission denied\)"):
        store.locate(name)


def test_only_files_are_listed(tmp_path):
    store, _ = kept(tmp_path)
    names = store.names()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "notes.txt").write_text("none")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    assert store.names() == names


@pytest.mark.parametrize("name", ["é" * 130, "a" * 201, 7, ["a"], None, "", "..", "a/b", "a\\b", "a:b"])
def test_what_is_no_plain_name_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(PlanError) as raised:
        PlanStore([], tmp_path).locate(name)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200


@pytest.mark.parametrize("name", ["con", "NUL.safetensors", "aux .v2", "COM1", "lpt¹", "a\nb", "\t", "a\x7f", "\ud800"])
def test_no_plan_is_written_under_a_name_that_not_every_system_takes(tmp_path, name):
    """One that has such a name all the same, and is read here, still opens."""
    store = PlanStore([], tmp_path)
    with pytest.raises(PlanError, match="cannot be the name of a file on every system") as raised:
        store.save(make_plan(1), name)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())
    if name != "\ud800":
        save_plan(make_plan(1), tmp_path / f"{name.removesuffix('.safetensors')}.safetensors")
        assert same(store.load(name), make_plan(1))
    for good in ("console", "nullify", "a.con", "稀疏 2", ".con"):
        assert store.path_to_write(good).parent == tmp_path


def test_saves_at_one_time_do_not_meet(tmp_path):
    """Two runs of one model may end together; what fails leaves nothing behind."""
    store, plans, errors = PlanStore([], tmp_path), [make_plan(1), make_plan(3)], []

    def save(plan):
        try:
            for _ in range(25):
                store.save(plan, "same")
                read = store.load("same")
                assert any(same(read, each) for each in plans)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(plans[number % 2],)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [file.name for file in tmp_path.iterdir()] == ["same.safetensors"]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"the beginning of a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plan_file_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_plan(make_plan(1), tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_name_of_many_bytes_can_be_saved(tmp_path):
    store = PlanStore([], tmp_path)
    name = "é" * 100
    store.save(make_plan(1), name)
    assert store.names() == [name + ".safetensors"]
