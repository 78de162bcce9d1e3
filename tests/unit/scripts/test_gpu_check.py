"""`scripts/gpu_check.py` without a GPU: a real session of pytest over small files, and what becomes of it."""

import json
import sys
import time

import pytest
from comfyui_paro.scripts import gpu_check
from comfyui_paro.scripts.gpu_check import Result

FILES = {
    "tests/gpu/test_a.py": """
import pytest

def test_right(): pass

@pytest.mark.parametrize("x", [1, 2])
def test_wrong(x): assert x == 2, "one is not two\\nand more"

def test_absent(): pytest.skip("no such thing")

@pytest.fixture
def leaves_a_mess():
    yield
    raise OSError("still open")

def test_mess(leaves_a_mess): assert False, "wrong before that"

class TestOfAKind:
    def test_inside(self): pass
""",
    "tests/host/test_gpu_families.py": """
import pytest

@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["wan_t2v", "flux"])
def test_family(name, dtype):
    if name == "flux":
        pytest.skip("no flux") if dtype == "bf16" else pytest.fail("flux is broken")
""",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two small test files in this one's place."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "comfyui_version.py").write_text('__version__ = "1.2.3"')
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    return tmp_path


def test_what_became_of_the_tests(project):
    result = gpu_check.check(project, [], jobs=1, timeout=300, commit="abc")
    assert (result["passed"], result["failed"], result["skipped"]) == (5, 3, 2)
    assert result["families"] == {
        "flux": {"bf16": "skipped", "fp16": "failed"},
        "wan_t2v": {"bf16": "passed", "fp16": "passed"},
    }
    assert [(failure["test"], failure["error"]) for failure in result["failures"]] == [
        ("tests/gpu/test_a.py::test_wrong[1]", "AssertionError: one is not two"),
        ("tests/gpu/test_a.py::test_mess", "AssertionError: wrong before that"),
        ("tests/host/test_gpu_families.py::test_family[flux-fp16]", "Failed: flux is broken"),
    ]
    assert result["skipped_because"] == {"no such thing": 1, "no flux": 1}
    assert (result["comfyui"], result["commit"]) == ("1.2.3", "abc")
    assert {"gpu", "date", "torch", "triton", "seconds"} < result.keys()
    assert json.loads(json.dumps(result)) == result


def test_only_what_is_asked_for(project):
    tests = gpu_check.run("tests/gpu", project, ["-k", "inside"], 1, time.monotonic() + 300)
    assert tests == [Result("tests/gpu/test_a.py::TestOfAKind::test_inside", "passed")]
    assert gpu_check.run("tests/gpu", project, ["-k", "no_such_name"], 1, time.monotonic() + 300) == []


def test_a_session_that_cannot_run_is_a_failure(project):
    (project / "tests/gpu/test_a.py").write_text("import a_module_that_is_not_there")
    (project / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    assert gpu_check.run("tests/host", project, [], 1, time.monotonic() + 300) == [
        Result("tests/host", "failed", "pytest ended with code 4")
    ]
    (project / "pytest.ini").write_text("")
    broken = gpu_check.run("tests/gpu", project, [], 1, time.monotonic() + 300)
    assert "failed" in [test.outcome for test in broken] and "test_a" in broken[0].name


def test_time_is_up(project):
    """What was done by then counts, and so does that there is more."""
    (project / "tests/gpu/test_a.py").write_text(
        "import pathlib, time\n"
        "def test_quick(): pass\n"
        "def test_endless():\n"
        "    pathlib.Path('begun').touch()\n"
        "    time.sleep(600)\n"
    )
    deadline, begun = time.monotonic() + 3600, project / "begun"

    class Clock:
        @staticmethod
        def monotonic() -> float:
            while not begun.exists():
                time.sleep(0.05)
            return deadline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "time", Clock)
        tests = gpu_check.run("tests/gpu", project, [], 1, deadline)
    assert Result("tests/gpu/test_a.py::test_quick", "passed") in tests
    assert tests[-1] == Result("tests/gpu", "failed", "stopped: the time was up")


def test_the_file_is_written_and_the_exit_code_tells(project, monkeypatch, capsys):
    (project / "comfy").mkdir()
    (project / "comfy/samplers.py").touch()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "some GPU")
    target = project / "new" / "result.json"
    command = ["gpu_check.py", "--host", str(project), "--json", str(target), "--jobs", "1", "--commit", "abc"]
    for only, code, last in (("test_right", 0, "1 passed, 0 failed"), ("test_wrong", 1, "1 passed, 1 failed")):
        monkeypatch.setattr(sys, "argv", [*command, "--only", only])
        assert gpu_check.main() == code
        assert capsys.readouterr().out.splitlines()[-1] == last
        assert json.loads(target.read_text())["gpu"] == "some GPU"
    monkeypatch.setattr(sys, "argv", [*command, "--only", "no_such_name"])
    assert gpu_check.main() == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "no GPU" in capsys.readouterr().err
