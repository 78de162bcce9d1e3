"""A plan file that a prompt names: read beside the server's event loop, and once for the check and the run."""

import asyncio
import os
import threading
import types

import pytest
from comfyui_paro.tests.mutated_plans import make_plan

pytestmark = pytest.mark.host_on_cpu


@pytest.fixture
def node(comfy, store, monkeypatch):
    """The node, with plans in `store`; `used`: plans of its runs; `read`: the threads that read a file."""
    from comfyui_paro.nodes import patch_model as module
    from comfyui_paro.nodes import storage
    from comfyui_paro.paro_runtime.plan import store as store_module

    read, used, load = [], [], store_module.load_plan

    def reading(path):
        read.append(threading.current_thread())
        return load(path)

    monkeypatch.setattr(store_module, "load_plan", reading)
    for each in (module, storage):
        monkeypatch.setattr(each, "plan_store", lambda: store)
    monkeypatch.setattr(module, "patch_model", lambda model, settings, plan=None, **more: used.append(plan))
    monkeypatch.setattr(module.PAROPatchModel, "hidden", types.SimpleNamespace(unique_id=None), raising=False)
    store.save(make_plan(), "p")
    return types.SimpleNamespace(its=module.PAROPatchModel, read=read, used=used, store=store)


def check(node, name):
    return asyncio.run(node.its.validate_inputs(plan_file=name))


def test_a_file_is_read_once_and_not_by_the_event_loop(node):
    assert check(node, "p.safetensors") is True
    assert len(node.read) == 1 and node.read[0] is not threading.main_thread()
    for _ in range(2):
        node.its.execute(None, plan_file="p.safetensors")
        assert check(node, "p.safetensors") is True
    # As long as a patched model has it.
    assert len(node.read) == 1 and node.used[0] is node.used[1]
    path = node.store.locate("p")
    node.store.save(make_plan(1), "p")
    os.utime(path, ns=(1, 1))
    assert check(node, "p.safetensors") is True and len(node.read) == 2
    node.its.execute(None, plan_file="p.safetensors")
    assert (node.used[-1].groups, len(node.read)) == (1, 2)
    node.used.clear()
    node.its.execute(None, plan_file="p.safetensors")
    node.used.clear()
    node.its.execute(None, plan_file="p.safetensors")
    assert len(node.read) == 4  # nobody had it any more


def test_what_is_wrong_with_a_file_is_told_by_the_check(node):
    path = node.store.locate("p")
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a complete safetensors file" in check(node, "p.safetensors")
    assert check(node, "none.safetensors") is True and check(node, "auto") is True
    assert "is not a plain file name" in check(node, "../p")


def test_a_file_that_goes_while_it_is_looked_at_is_told(node, monkeypatch):
    path, locate = node.store.locate("p"), node.store.locate

    def going(name):
        found = locate(name)
        path.unlink()
        return found

    monkeypatch.setattr(node.store, "locate", going)
    with pytest.raises(ValueError, match=r"plan_file: p\.safetensors: cannot be read \(No such file"):
        node.its.execute(None, plan_file="p.safetensors")
