"""What follows from a recipe: dense steps, floors, expected gains."""

import pytest
import torch
from comfyui_paro.kernels.core.layout import TokenLayout
from comfyui_paro.paro_runtime.attention.dense import paro_pays_when_short
from comfyui_paro.paro_runtime.config.recipes import FOLDER, all_recipes, recipe_for
from comfyui_paro.paro_runtime.config.settings import Settings
from comfyui_paro.paro_runtime.plan.plan import ModelIdentity, Site
from comfyui_paro.paro_runtime.run.policy import Policy
from comfyui_paro.paro_runtime.run.session import Session


@pytest.mark.parametrize("family", all_recipes())
def test_dense_steps_of_short_and_full_schedules(family):
    recipe = recipe_for(family)
    assert [recipe.dense_steps(n) for n in (1, 4, 8)] == [1, 1, 1]
    assert 2 <= recipe.dense_steps(20) <= 6
    assert [recipe.dense_steps(n, small=True) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert recipe.dense_steps(20, small=True) == recipe.dense_steps(20)
    steps = [recipe.dense_steps(n) for n in range(1, 60)]
    assert steps == sorted(steps)


@pytest.mark.parametrize("family", all_recipes())
def test_expected_gains(family):
    """More tokens and fewer blocks gain more; everything kept gains nothing beyond a faster kernel."""
    recipe = recipe_for(family)
    assert recipe.attention_half[0] < recipe.attention_half[1]
    for low, high in (recipe.expected_gain(TokenLayout(0, (1, 1, n)), 0.3) for n in recipe.typical.values()):
        assert 1 < low < high < 5
    small, large = (recipe.expected_gain(TokenLayout(0, (1, 1, n)), 0.3) for n in (4096, 65536))
    assert small[0] < large[0] and small[1] < large[1]
    assert recipe.expected_gain(TokenLayout(0, (1, 1, 4096)), 1.0)[0] == 1
    kept_text = recipe.expected_gain(TokenLayout(4096, (1, 1, 4096)), 0.3)
    assert kept_text[0] < small[0]


def test_gains_of_images_are_small_at_1024_pixels():
    for family in ("flux", "flux2", "qwen_image", "lumina2", "krea2"):
        recipe = recipe_for(family)
        assert recipe.expected_gain(TokenLayout(512, (1, 64, 64)), recipe.densities["balanced"])[0] < 1.15


@pytest.mark.parametrize(
    "settings, backend, capability, tokens, least",
    [
        (Settings(), "triton", (8, 9), 4096, 9216),
        (Settings(), "triton", (8, 9), 9216, None),
        (Settings(), "triton", None, 9216, None),
        (Settings(), "triton", (9, 0), 9216, 12288),
        (Settings(), "triton", (10, 0), 12287, 12288),
        (Settings(), "triton", (9, 0), 12288, None),
        (Settings(preset="custom", density=0.3), "triton", (9, 0), 4096, None),
        (Settings(), "reference", None, 4096, None),
    ],
)
def test_short_grids_keep_every_block(monkeypatch, settings, backend, capability, tokens, least):
    monkeypatch.setattr("comfyui_paro.paro_runtime.run.session.capability_of_gpu", lambda device: capability)
    session = Session(Policy(ModelIdentity("sdxl", "a", "w"), recipe_for("sdxl"), settings), sigmas=[1.0, 0.5, 0.0])
    session.log.backend = backend
    reason = session.too_short_to_drop(tokens, torch.device("cpu"))
    assert reason == (least and f"every block kept: {tokens} grid tokens, sparse from {least} on")


def test_a_short_grid_runs_in_paros_own_attention():
    recipe = recipe_for("sdxl")
    session = Session(Policy(ModelIdentity("sdxl", "a", "w"), recipe, Settings(backend="reference")), sigmas=[1.0, 0.0])
    session.too_short_to_drop = lambda *_: "every block kept"
    evaluation = session.begin(layout=TokenLayout(0, (1, 16, 16)), sigma=1.0)
    q, k, v = torch.randn(3, 1, 2, 256, 32)

    out = evaluation.attend(Site("block", 0), q, k, v, dense=lambda: pytest.fail("the host's attention ran"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert ((out - expected).norm() / expected.norm()).item() < 0.05
    assert session.log.counts.dense == {"every block kept": 1}


@pytest.mark.parametrize("family", all_recipes())
def test_every_family_has_a_row_in_the_docs(family):
    text = (FOLDER.parent / "docs" / "models.md").read_text(encoding="utf-8")
    row = next((line for line in text.splitlines() if f"(`{family}`)" in line), "")
    recipe = recipe_for(family)
    cells = [cell.strip() for cell in row.split("|")]
    assert " / ".join(str(density) for density in recipe.densities.values()) in cells
    assert " / ".join(str(recipe.dense_steps(steps)) for steps in (4, 20, 50)) in cells
    gain = "{:.2f} to {:.2f}"
    for title, tokens in recipe.typical.items():
        expected = recipe.expected_gain(TokenLayout(0, (1, 1, tokens)), recipe.densities["balanced"])
        assert f"{title} ({tokens:,}): {gain.format(*expected)}" in row


@pytest.mark.parametrize("choice, ours", [("auto", False), ("host", False), ("paro", True)])
def test_short_sequences_stay_with_the_host_where_its_dense_attention_is_faster(monkeypatch, choice, ours):
    monkeypatch.setattr("comfyui_paro.paro_runtime.run.evaluation.paro_pays_when_short", lambda device: False)
    settings = Settings(backend="reference", dense_attention=choice)
    session = Session(Policy(ModelIdentity("sdxl", "a", "w"), recipe_for("sdxl"), settings), sigmas=[1.0, 0.0])
    session.too_short_to_drop = lambda *_: "every block kept"
    layout = TokenLayout(0, (1, 16, 16))
    q, k, v = torch.randn(3, 1, 2, layout.length, 32)
    asked = []

    def dense():
        asked.append(True)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    session.begin(layout=layout, sigma=1.0).attend(Site("double", 0), q, k, v, dense=dense)
    assert bool(asked) is not ours and session.log.counts.dense == {"every block kept": 1}


def test_hopper_is_where_the_hosts_is_faster(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert not paro_pays_when_short(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert paro_pays_when_short(torch.device("cuda")) and paro_pays_when_short(torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "grid", "density"),
    [
        ({"preset": "balanced"}, (4, 8, 12), 0.7),
        ({"preset": "fast"}, (4, 8, 12), 0.55),
        ({"preset": "balanced"}, (9, 30, 32), 0.3),
        ({"preset": "custom", "density": 0.3}, (4, 8, 12), 0.3),
        ({"preset": "balanced", "density": 0.3}, (4, 8, 12), 0.3),
    ],
)
def test_presets_keep_more_of_a_small_grid_and_say_so(settings, grid, density):
    """A density that the user gives is taken as it is."""
    identity, layout = ModelIdentity("wan", "a", "b"), TokenLayout(0, grid)
    session = Session(Policy(identity, recipe_for("wan"), Settings(**settings)), sigmas=[1.0, 0.5, 0.0])
    q = torch.randn(1, 2, layout.length, 16) if density > session.options.density else None
    for sigma in (1.0, 0.5):
        evaluation = session.begin(layout=layout, sigma=sigma)
        assert session.grids()[0].plan or session.grids()[0].calibrator.options.density == density
        if q is not None:
            evaluation.attend(Site("block", 0), q, q, q, dense=lambda: q)
        evaluation.end()
    raised = f"density raised from {100 * session.options.density:.1f} % to hold quality"
    assert (raised in session.finish().text()) == (density > session.options.density)


@pytest.mark.parametrize(
    ("settings", "grid", "dense"),
    [
        ({"preset": "balanced"}, (4, 8, 12), 2),
        ({"preset": "balanced"}, (9, 30, 32), 1),
        ({"preset": "balanced", "dense_steps": 1}, (4, 8, 12), 1),
        ({"preset": "custom", "density": 0.3}, (4, 8, 12), 1),
    ],
)
def test_presets_have_a_quarter_of_few_steps_dense_on_a_small_grid(settings, grid, dense):
    policy = Policy(ModelIdentity("wan", "a", "b"), recipe_for("wan"), Settings(**settings))
    session = Session(policy, sigmas=[1 - step / 8 for step in range(9)])
    session.begin(layout=TokenLayout(0, grid), sigma=1.0)
    session.begin(layout=TokenLayout(0, (4, 8, 13)), sigma=1.0)  # the first grid decides
    assert session.schedule.dense_steps == dense
