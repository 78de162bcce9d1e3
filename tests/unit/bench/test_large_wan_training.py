"""Training of the large bed at toy size: a step helps, a piece goes on to the bit, and what it leaves behind."""

import json
import math

import pytest
import torch
from comfyui_paro.bench.large_wan import curriculum
from comfyui_paro.bench.large_wan.data import make_batch
from comfyui_paro.bench.large_wan.flow import draw_sigmas, held_out, loss
from comfyui_paro.bench.large_wan.model import CONFIG, load_large_wan, new_model
from comfyui_paro.bench.large_wan.pack import unpack
from comfyui_paro.bench.large_wan.textures import Photos
from comfyui_paro.bench.large_wan.train import TOY_CONFIG, Piece, train
from comfyui_paro.bench.large_wan.trainer import Options, Trainer

# Training needs tensors that count versions.
pytestmark = pytest.mark.ordinary_tensors
TOY = Options(steps=6, tokens=96, device="cpu", config=TOY_CONFIG, stages=curriculum.TOY_STAGES)


def trainer(**changes) -> Trainer:
    return Trainer(Options(**{**vars(TOY), **changes}), Photos.none())


def test_a_step_lowers_the_loss_on_a_fixed_batch() -> None:
    made = make_batch(4, (2, 3, 4), torch.Generator().manual_seed(0))
    clean, noise = made.latent(), torch.randn(4, 16, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.3, 0.6, 0.8, 0.95])

    def fixed(network):
        return loss(network, clean, sigma, noise, made.contexts()).mean()

    run = trainer(rate=0.2)  # the first step's rate is a 200th of it
    before = float(run.train_step(fixed))
    assert float(fixed(run.model).detach()) < before - 0.01


def test_a_piece_goes_on_to_the_bit_where_it_was_saved(tmp_path) -> None:
    whole, first, second = trainer(), trainer(), trainer()
    losses = [float(whole.train_step()) for _ in range(5)]
    for _ in range(2):
        first.train_step()
    Piece(first, tmp_path, [], toy=True).save()
    Piece(second, tmp_path, [], toy=True).go_on(None)
    assert [float(second.train_step()) for _ in range(3)] == losses[2:]
    for name in ("model", "average"):
        there, here = whole.state()[name], second.state()[name]
        assert all(torch.equal(there[key], here[key]) for key in there)
    assert whole.state()["counts"] == second.state()["counts"]
    # From the packed average alone: the step, the weights nearly, and the learning rate rises anew.
    third = trainer()
    third.start_from(tmp_path / "average.safetensors")
    assert third.step == third.fresh == 2
    key = "blocks.1.ffn.0.weight"
    torch.testing.assert_close(third.model.state_dict()[key], first.average.state_dict()[key], atol=1e-3, rtol=0)


def test_pieces_leave_a_log_samples_and_weights(tmp_path) -> None:
    for _ in range(2):
        train(tmp_path, Options(steps=22, device="cpu"), seconds=0.0, toy=True)
    log = json.loads((tmp_path / "log.json").read_text())
    # The first piece ended at the first look at the clock, the second with the schedule.
    assert [piece[:2] for piece in log["pieces"]] == [[0, 20], [20, 22]]
    assert [entry[0] for entry in log["loss"]] == [20, 22] and log["steps_done"] == 22
    assert set(log["held_out"][-1]["losses"]["2x3x4"]) == {"right", "other motion", "other clip"}
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert len((tmp_path / "samples.txt").read_text().splitlines()) == 6
    model = load_large_wan(tmp_path / "average.safetensors")
    assert model.cfg == TOY_CONFIG and not model.training
    assert unpack(tmp_path / "average.safetensors")[1]["step"] == "22"


def test_a_loss_that_is_not_finite_ends_the_piece_and_saves_nothing(tmp_path) -> None:
    piece = Piece(trainer(), tmp_path, [], toy=True)
    with pytest.raises(FloatingPointError, match="loss nan"):
        piece.look([torch.tensor(math.nan)], 1.0)
    assert list(tmp_path.iterdir()) == []


def test_gpus_draw_other_clips_of_the_same_grid() -> None:
    one, two = trainer(), trainer()
    two.rank = 1
    assert one.grid() == two.grid()
    assert float(one.train_step()) != float(two.train_step())


def test_the_learning_rate_rises_and_falls_by_the_schedule() -> None:
    run = trainer(steps=1000)
    rates = []
    for run.step in (0, 199, 500, 999):
        rates.append(run.rate() / TOY.rate)
    assert rates == pytest.approx([1 / 200, 0.907, 0.5025, 0.005], abs=2e-3)


def test_stages_follow_each_other_and_cost_what_the_formula_says() -> None:
    ends = [stage.end for stage in curriculum.STAGES]
    assert ends == sorted(ends) and ends[-1] == 1
    assert curriculum.stage_at(0, 100) is curriculum.STAGES[0]
    assert curriculum.stage_at(99, 100) is curriculum.stage_at(120, 100) is curriculum.STAGES[-1]
    large = [math.prod(grid) for grid in curriculum.STAGES[-1].grids]
    assert min(large) >= 6000 and max(large) <= 20_000
    trained = {grid for stage in curriculum.STAGES for grid in stage.grids}
    assert not trained & set(curriculum.HELD_OUT_GRIDS)
    # One token attends to itself alone: 2 per weight and 4 dim, three times over.
    weights = 6 * 512**2 + 2 * 512 * 768
    assert curriculum.flops((1, 1, 1), 1, CONFIG) == 3 * 8 * (2 * weights + 4 * 512)
    assert "20000 steps" in curriculum.table(CONFIG, 65536, 20000, 320e12)


def test_the_model_has_the_size_that_was_asked_for() -> None:
    model = new_model()
    assert 20e6 <= sum(p.numel() for p in model.parameters()) <= 30e6
    assert (model.cfg.heads, model.cfg.layers) == (4, 8)
    table = model.text_embedding[0].weight
    assert float(table[:, :38].detach().std() * 8) == pytest.approx(1, abs=0.05) and not bool(table[:, 38:].any())


def test_noise_levels_lie_between_and_held_out_clips_are_always_the_same() -> None:
    sigma = draw_sigmas(2000, torch.Generator().manual_seed(0))
    assert float(sigma.min()) > 0 and float(sigma.max()) < 1 and 0.6 < float(sigma.median()) < 0.95
    model, cpu = new_model(TOY_CONFIG), torch.device("cpu")
    real = [torch.zeros(1, 16, 2, 6, 8)]
    found = [held_out(model, cpu, Photos.none(), real, (((2, 3, 4), 2),)) for _ in range(2)]
    assert found[0] == found[1] and set(found[0]) == {"2x3x4", "real 0"}
