"""Heads split over two GPUs by NCCL, Triton kernels: what two ranks give is what one gives."""

import pytest
import torch
from comfyui_paro.tests import ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason="FEWER THAN TWO GPUS: heads split over GPUs are not tested on any"
    ),
]
# Kernels may tile calls of fewer heads another way, which is rounding of 8 or 16 bits; after eight steps it has grown.
CALL, LATENT = 2e-3, 2e-2


def test_two_gpus_give_what_one_gives(tmp_path):
    two = ranks.run_ranks(2, tmp_path, "cuda")
    one = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in ranks.alone("cuda").items()}
    assert one["sparse"] == two[0]["sparse"] == two[1]["sparse"] and one["sparse"]["sparse"] == 20
    for name, heads, *_ in ranks.CALLS:
        whole, padding = ranks.joined([its[name, heads] for its in two], ranks.STREAMS[name])
        assert (whole - one[name, heads]).norm() < CALL * one[name, heads].norm() and not padding.any()
    for site, (orders, *_) in one["plan"].items():
        assert all(its["plan"][site][0] == orders for its in two)
    for name in ("given plan", "on the way"):
        assert torch.equal(two[0][name], two[1][name])
        assert (two[0][name] - one[name]).norm() < LATENT * one[name].norm(), name
