"""The large bed on a GPU, at toy size: training goes on from a checkpoint, and PARO's kernels run in the suite."""

import pytest
import torch
from comfyui_paro.bench.large_wan.bed import LargeBench
from comfyui_paro.bench.large_wan.curriculum import TOY_STAGES
from comfyui_paro.bench.large_wan.pack import pack
from comfyui_paro.bench.large_wan.textures import Photos
from comfyui_paro.bench.large_wan.train import TOY_CONFIG, Piece
from comfyui_paro.bench.large_wan.trainer import Options, Trainer
from comfyui_paro.bench.metrics import psnr
from comfyui_paro.bench.paro_bench.tiny import Variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the large bed is not tested on one"),
]


def trainer() -> Trainer:
    options = Options(steps=40, tokens=256, rate=0.02, device="cuda", config=TOY_CONFIG, stages=TOY_STAGES)
    return Trainer(options, Photos.none("cuda"))


@pytest.mark.ordinary_tensors
def test_a_piece_goes_on_where_it_was_saved(tmp_path) -> None:
    first, second = trainer(), trainer()
    for _ in range(3):
        first.train_step()
    Piece(first, tmp_path, [], toy=True).save()
    Piece(second, tmp_path, [], toy=True).go_on(None)
    # A step count on the GPU would be waited for in every step.
    assert all(state["step"].device.type == "cpu" for state in second.adam.state.values())
    assert float(second.train_step()) == pytest.approx(float(first.train_step()), rel=1e-2)


@pytest.mark.parametrize("precision", ["16bit", "int8"])
def test_the_suite_runs_on_the_kernels_as_on_the_reference(tmp_path, precision) -> None:
    torch.manual_seed(0)
    run = trainer()
    torch.nn.init.normal_(run.model.head.head.weight, std=0.02)
    pack(run.model.state_dict(), tmp_path / "w", {"step": "0", "clips": "0"}, 0.0)
    bench = LargeBench((6, 12, 14), tmp_path / "w", "cuda", seeds=(7, 8), dtype=torch.float16)
    videos = {}
    for backend in ("reference", "triton"):
        variant = Variant("some", 0.5, 3, plan="offline", videos=1, backend=backend, precision=precision)
        session = bench.session(variant, plan=bench.offline_plan(variant))
        videos[backend] = bench.decode(bench.sample((7,), session))
        report = session.finish()
        assert (report.sites_sparse, report.backend) == (bench.layers, backend)
    # Dense and sparse are 73 dB apart here, 16 bits and 32 are 95 (reference on a CPU).
    assert psnr(videos["triton"], videos["reference"]) > 80
