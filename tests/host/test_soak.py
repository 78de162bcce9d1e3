"""A few runs of the soak: that it runs, counts, and sees what goes wrong."""

from pathlib import Path

import pytest
from comfyui_paro.scripts import soak as soak_module

pytestmark = pytest.mark.host_on_cpu


def test_runs_of_all_kinds(host_path, tmp_path):
    tally = soak_module.soak(host_path, tmp_path, 3, 13, seed=1)
    assert tally.failures == [] and tally.runs == 13 and tally.sparse and tally.faults and tally.unpatched == 3
    found = tally.as_dict()
    assert found["growth_mb"] is None  # the warm-up is longer


def test_growth_is_that_after_the_warm_up():
    tally = soak_module.Tally(megabytes=[100.0 + number for number in range(30)] + [200.0] * 5 + [203.0, 202.0])
    assert tally.as_dict()["growth_mb"] == 3.0


def test_what_fails_is_told(monkeypatch):
    class Server:
        folder, process_id = Path("/nowhere"), 0

        def run(self, graph, **more):
            raise RuntimeError("the server is gone")

    its = soak_module.Soak(Server(), 0)
    for _ in range(3):
        its.run_one()
    assert len(its.tally.failures) == 3 and all("the server is gone" in line for line in its.tally.failures)
