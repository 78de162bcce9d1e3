"""The bench of mechanisms changes what it says, times what it says, and compares at equal time; toy sizes."""

import json

import pytest
import torch
from comfyui_paro.bench.large_wan import equal_time, mechanisms, pack, routing
from comfyui_paro.bench.large_wan.equal_time import AtTime, at_time, gains
from comfyui_paro.bench.large_wan.model import new_model
from comfyui_paro.bench.large_wan.timed import Times
from comfyui_paro.bench.large_wan.train import TOY_CONFIG
from comfyui_paro.bench.metrics import flicker
from comfyui_paro.kernels.core.layout import TokenLayout, geometry_of
from comfyui_paro.paro_runtime.calibration.mask_choice import masks_of_counts
from comfyui_paro.paro_runtime.plan.orders import order_table
from comfyui_paro.paro_runtime.run import evaluation as evaluation_module

GRID, STEPS, DENSE = (4, 8, 11), 6, 2


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> mechanisms.Setup:
    """A model of random weights whose attention is peaked enough for masks to matter."""
    torch.manual_seed(0)
    state = new_model(TOY_CONFIG).state_dict()
    for key, value in state.items():
        if "bias" in key or (value.ndim == 2 and not value.any()):
            state[key] = torch.randn_like(value) * 0.1
        if "norm_q.weight" in key or "norm_k.weight" in key:
            state[key] = value * 2.0
    path = tmp_path_factory.mktemp("mechanisms") / "weights.safetensors"
    pack.pack(state, path, {"step": "7", "clips": "70"}, fraction=0.0)
    return mechanisms.Setup(path, GRID, 2, STEPS, DENSE, "cpu", "reference", "16bit", repeats=1)


@pytest.fixture(scope="module")
def bench(setup):
    with torch.inference_mode():
        return setup.bench()


def sampled(bench, setup, name, density=0.3):
    row = next(row for row in setup.rows() if row.name == name)
    plan = row.source(bench, row.variant(density, setup.dense_steps, setup.backend, setup.precision))
    return mechanisms.sample_once(bench, setup, row, density, plan)


def test_flicker_is_the_ratio_of_second_differences():
    still = torch.linspace(-0.5, 0.5, 5)[:, None].expand(5, 3)
    shaking = still.clone()
    shaking[2] += 0.1
    more = still.clone()
    more[2] += 0.3
    assert flicker(more, shaking) == pytest.approx(3, rel=1e-4) and flicker(shaking, shaking) == 1
    with pytest.raises(ValueError, match="three frames"):
        flicker(still[:2], still)


def test_at_equal_time_it_is_linear_between_points_and_a_little_beyond():
    points = [(3.0, 40.0), (1.0, 30.0), (2.0, 36.0)]
    assert at_time(points, 1.5) == AtTime(33.0, False) and at_time(points, 2.0) == AtTime(36.0, False)
    assert at_time(points, 3.3) == AtTime(pytest.approx(41.2), True)
    assert at_time(points, 0.9) == AtTime(pytest.approx(29.4), True)
    assert at_time(points, 3.5) is None and at_time(points, 0.8) is None
    # Two times that differ by noise alone say nothing of a third.
    assert at_time([(1.0, 30.0), (1.001, 31.0)], 1.1) is None
    assert at_time(points[:1], 3.1) is None and at_time([], 1.0) is None


def test_gains_are_over_the_default_at_its_time():
    rows = [
        {"name": name, "density": density, "attention_seconds": seconds, "psnr": psnr}
        for name, density, seconds, psnr in (
            ("default", 0.2, 2.0, 30.0),
            ("default", 0.3, 3.0, 34.0),
            ("slow", 0.2, 2.5, 31.0),
            ("slow", 0.3, 3.5, 35.0),
        )
    ]
    found = gains(rows)
    assert found["default"] == {0.2: AtTime(0.0, False), 0.3: AtTime(0.0, False)}
    assert found["slow"] == {0.2: None, 0.3: AtTime(-1.0, False)}


def test_times_are_split_into_dense_steps_once_and_sparse_steps():
    found = {("dense", 0): 1.0, ("attend", 0): 1.0, ("dense", 1): 1.0, ("attend", 1): 3.0, ("begin", 2): 0.5}
    found |= {("attend", 2): 0.25, ("route", 2): 0.125, ("attend", 3): 0.25}
    times = Times.of(found, 4, 2)
    assert (times.dense, times.once, times.sparse) == (2.0, 2.5, (0.375, 0.25)) and times.whole == 5.125
    assert Times.of(found, 4, 2, free=True).sparse == (0.25, 0.25)
    first = Times.of({("attend", 0): 5.0, ("attend", 1): 1.0, ("attend", 2): 1.0}, 3, 0)
    assert (first.dense, first.once, first.sparse) == (0.0, 4.0, (1.0, 1.0, 1.0))


@pytest.mark.parametrize("name", ["default", "model's own order only", "tail off", "radial, drop"])
def test_with_every_block_a_row_is_the_dense_run(bench, setup, name):
    assert bench.compare(sampled(bench, setup, name, 1.0).latents)["psnr_worst"] > 80


def test_what_is_switched_off_is_off(bench, setup):
    default = sampled(bench, setup, "default")
    assert default.report.plan.groups == 3 and default.report.plan.expansions == 16
    assert default.session.refresh.error and default.session.refresh._biases
    assert bench.compare(default.latents)["psnr_worst"] < 80
    assert any(" " not in name and "x" in name for name in default.report.plan.made["candidates"])
    assert set(sampled(bench, setup, "model's own order only").report.orders_histogram) == {"FHW"}
    axes = sampled(bench, setup, "axis orders only").report.plan.made["candidates"]
    assert len(axes) > 1 and not any("x" in name for name in axes)
    assert sampled(bench, setup, "expansions 0").report.plan.expansions == 0
    assert all(e.tail_bias is None for e in sampled(bench, setup, "tail off").report.plan.sites.values())
    assert sampled(bench, setup, "constant density").report.plan.groups == 1
    assert not sampled(bench, setup, "bias of pools alone").session.refresh._biases
    assert sampled(bench, setup, "bias of the plan").session.refresh is None
    steep, falling = (run.report.plan.densities for run in (sampled(bench, setup, "steep schedule"), default))
    assert steep[0] / steep[-1] > 1.5 * falling[0] / falling[-1]
    heads = torch.cat([e.density for e in sampled(bench, setup, "budget per head").report.plan.sites.values()], 1)
    assert (heads.amax(1) - heads.amin(1)).max() < 1e-6
    by_mass = sampled(bench, setup, "masks of the plan, by mass").report
    assert by_mass.plan.made["criterion"] == "mass" and by_mass.sites_routed == 0


def test_a_found_plan_is_of_other_clips_and_a_fixed_one_has_a_tail_only_where_it_says_so(bench, setup):
    found = sampled(bench, setup, "plan found, of other clips")
    assert found.report.plan_source == "given plan" and found.times.once < sampled(bench, setup, "default").times.once
    tails = [sampled(bench, setup, f"window, {rest}") for rest in ("drop", "tail")]
    biases = [next(iter(run.report.plan.sites.values())).tail_bias is not None for run in tails]
    assert biases == [False, True] and [run.report.attention_error is None for run in tails] == [True, False]
    assert {name for run in tails for name in run.report.orders_histogram} <= {"FHW", "HWF"}


@pytest.mark.parametrize(("rest", "times"), [("every step", STEPS - DENSE), ("each group", 3)])
def test_the_session_runs_with_the_masks_that_were_routed(bench, setup, monkeypatch, rest, times):
    """Of every sparse call, the mask is that of this call's (or the group's first call's) queries and keys."""
    used, made = [], []
    real = evaluation_module.run_kernel

    def run_kernel(q, k, v, pattern, *args, **more):
        if pattern.kept_words is not None:
            used.append(pattern.mask)
        return real(q, k, v, pattern, *args, **more)

    def choose(worth, counts):
        made.append(masks_of_counts(worth, counts))
        return made[-1]

    monkeypatch.setattr(evaluation_module, "run_kernel", run_kernel)
    monkeypatch.setattr(routing, "masks_of_counts", choose)
    run = sampled(bench, setup, f"routed by means of 64, {rest}")
    assert len(made) == times * bench.layers and len(used) == (STEPS - DENSE) * bench.layers
    assert all(any(torch.equal(mask, its[0]) for its in made) for mask in used)
    kept = torch.stack([mask.float().mean() for mask in used]).mean().item()
    assert run.router.density == pytest.approx(kept, abs=0.02) and kept == pytest.approx(0.3, abs=0.06)


def test_what_routing_goes_by_is_what_it_says():
    layout = TokenLayout(0, (3, 7, 11))
    g = geometry_of(layout, 64)
    q, k, v = torch.randn(3, 1, 2, 231, 128).unbind()
    tables = torch.stack([order_table(name, layout.grid) for name in ("FHW", "HWF")])
    exact, pooled = (worth(q, k, v, g, tables) for worth in (routing.true_mass, routing.pooled_scores(64)))
    for head in range(2):
        rows = tables[head].long()
        queries, keys = q[0, head, rows].split(64), k[0, head, rows].split(64)
        weights = (torch.cat(queries) @ torch.cat(keys).T * 128**-0.5).softmax(1)
        sums = torch.stack([torch.stack([b.sum() for b in a.split(64, 1)]) for a in weights.split(64)])
        torch.testing.assert_close(exact[head], sums, rtol=1e-3, atol=1e-3)
        means = [torch.stack([part.mean(0) for part in parts]) for parts in (queries, keys)]
        sizes = torch.tensor([len(part) for part in keys])
        scores = means[0] @ means[1].T * 128**-0.5 + sizes.log()
        torch.testing.assert_close(pooled[head], scores.softmax(1) * sizes[:, None], rtol=1e-4, atol=1e-4)
    fine = routing.pooled_scores(16)(q, k, v, g, tables)
    torch.testing.assert_close(fine.sum((1, 2)), torch.full((2,), 231.0))
    errors = routing.true_error(q, k, v, g, tables)
    assert errors.shape == exact.shape == fine.shape and (errors >= 0).all()


def test_a_file_grows_by_rows_is_taken_up_again_and_makes_a_table(setup, tmp_path):
    path, told = tmp_path / "rows.json", []
    more = {"only": "^policy: oracle by mass$", "told": told.append}
    mechanisms.run(setup, [0.2, 0.3], path, limit_seconds=0.0, **more)
    assert "stopped" in told[-1] and not path.exists()
    rows = mechanisms.run(setup, [0.2, 0.3], path, **more)
    assert [row["name"] for row in rows] == ["default"] * 2 + ["oracle by mass"] * 2
    content = json.loads(path.read_text())
    assert content["rows"] == json.loads(json.dumps(rows)) and content["facts"]["weights_step"] == "7"
    told.clear()
    assert mechanisms.run(setup, [0.2, 0.3], path, **more) == content["rows"] and len(told) == 1
    with pytest.raises(ValueError, match="precision"):
        mechanisms._taken_up(path, setup.facts() | {"precision": "fp8"})
    text = equal_time.tables([path])
    assert "| default |" in text and "+0.00 | +0.00 |" in text and "| oracle by mass (masks for free) |" in text
