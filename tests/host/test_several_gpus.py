"""The real host in two processes that share one picture: what PARO's override sees there, and what it gives."""

from pathlib import Path

import pytest
import torch
from comfyui_paro.tests import ranks

pytestmark = pytest.mark.host_on_cpu


def test_two_ranks_of_the_host_give_the_latent_of_one(comfy, wan, tmp_path):
    from comfyui_paro.tests.host import split_wan

    two = ranks.run_ranks(2, tmp_path, script=Path(split_wan.__file__))
    model = comfy.patched(wan, **split_wan.SETTINGS)
    expected = {"dense": comfy.sample(wan, split_wan.GRID, steps=split_wan.STEPS)}
    expected["sparse"] = comfy.sample(model, split_wan.GRID, steps=split_wan.STEPS)
    assert (expected["sparse"] - expected["dense"]).norm() > 1e-3 * expected["dense"].norm()
    for rank in two:
        # Where the exchanged heads go to the host's attention the override is asked, and has half of the heads.
        assert rank["calls"] == comfy.report(model).calls and not rank["fallbacks"]
        assert rank["heads"] == comfy.HEADS // 2
        for name, its in expected.items():
            assert (rank[name] - its).norm() < 1e-5 * its.norm(), name
        # Where they go past it, PARO is not asked, changes nothing and says so.
        assert torch.equal(rank["untold"], rank["dense"])
        assert rank["passed"].startswith("Not used: no self-attention over the 315 tokens")
        assert [reason.split("; ")[1] for reason, _ in rank["seen"]] == ["seen: none"]
    # No rank keeps a plan of its heads as one of the model.
    assert not [path for path in tmp_path.glob("plans*/**/*") if path.is_file()]
