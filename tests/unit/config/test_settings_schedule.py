"""Settings refuse nonsense by name; schedules know dense steps and blocks; recipes follow their schema."""

import json
import math

import jsonschema
import pytest
from comfyui_paro.paro_runtime.config.recipes import (
    FOLDER,
    RecipeError,
    all_recipes,
    default_dense_steps,
    mask_options,
    recipe_for,
)
from comfyui_paro.paro_runtime.config.settings import Settings, SettingsError, in_blocks, parse_blocks
from comfyui_paro.paro_runtime.plan.options import FALL, STEEP_FALL, falling_densities
from comfyui_paro.paro_runtime.run.schedule import Schedule

WRONG = [
    ({"preset": "best"}, "preset"),
    ({"preset": "custom"}, "density"),
    ({"density": 0}, "density"),
    ({"density": 1.5}, "density"),
    ({"density": math.nan}, "density"),
    ({"density": "0.3"}, "density"),
    ({"precision": "int2"}, "precision"),
    ({"tail": True}, "tail"),
    ({"order": "random"}, "order"),
    ({"backend": "cuda"}, "backend"),
    ({"dense_steps": -2}, "dense_steps"),
    ({"dense_steps": 1.5}, "dense_steps"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"mass_target": -0.1}, "mass_target"),
    ({"mass_target": 97}, "mass_target"),
    ({"mass_target": math.nan}, "mass_target"),
    ({"density_schedule": "rising"}, "density_schedule"),
    ({"dense_blocks": "0, x"}, "dense_blocks"),
    ({"dense_blocks": "9-3"}, "dense_blocks"),
    ({"preset": ["fast"]}, "preset"),
    ({"density": "x" * 5000}, "density"),
    ({"dense_steps": "7" * 5000}, "dense_steps"),
    ({"min_tokens": float("inf")}, "min_tokens"),
    ({"calibrate": "no"}, "calibrate"),
    ({"strict": 1}, "strict"),
    ({"verbose": None}, "verbose"),
    ({"recipe": ["wan"]}, "recipe"),
    ({"recipe": None}, "recipe"),
]


@pytest.mark.parametrize("change, field", WRONG)
def test_a_bad_setting_is_one_line_that_names_the_field(change, field):
    with pytest.raises(SettingsError, match=f"^{field}: ") as error:
        Settings(**change).validated()
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_good_settings_pass():
    assert Settings().validated() == Settings()
    Settings(preset="custom", density=1.0, dense_blocks="0, 1, -1, 47-49", dense_steps=0).validated()


def test_blocks_count_from_both_ends():
    ranges = parse_blocks("0, 1, -1, 4-5")
    assert [i for i in range(10) if in_blocks(ranges, i, 10)] == [0, 1, 4, 5, 9]
    assert not in_blocks(ranges, 9, None)
    assert parse_blocks(" ") == ()


@pytest.mark.parametrize("wrong", [["a", "b", "c"], 3, {"a": 1}, b"x", "9" * 5000, "x" * 70000])
def test_blocks_that_are_no_text_or_too_long_are_refused_in_one_sentence(wrong):
    """A workflow may hold anything."""
    with pytest.raises(SettingsError, match=r"^dense_blocks: ") as refused:
        Settings(dense_blocks=wrong).validated()
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)


def test_dense_steps_follow_few_step_and_full_schedules():
    assert [default_dense_steps(n, 0.2) for n in (1, 4, 8, 20, 50)] == [1, 1, 2, 4, 10]
    schedule = Schedule(4, 4, 0, 9)
    assert all(schedule.is_dense_step(i) for i in range(4))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.67, 0.7, 0.9, 0.99, 1.0])
def test_falling_densities_have_their_mean_and_stay_within_one(density):
    found = falling_densities(density)
    assert sum(found) / 3 == pytest.approx(density) and all(0 < value <= 1 for value in found)
    assert found[0] >= found[1] >= found[2]
    if density * 1.48 < 1:  # nothing to redistribute
        assert found[0] / found[2] == pytest.approx(FALL) and found[0] / found[1] == pytest.approx(FALL**0.5)


# steps, dense steps, sparse steps of each of three groups
GROUPED = [
    (8, 2, (2, 2, 2)),
    (8, 3, (2, 1, 2)),
    (8, 1, (2, 3, 2)),
    (20, 4, (5, 6, 5)),
    (50, 10, (13, 14, 13)),
    (4, 1, (1, 1, 1)),
    (4, 2, (1, 0, 1)),
    (4, 3, (0, 1, 0)),
    (4, 4, (0, 0, 0)),
]


@pytest.mark.parametrize("steps, dense, counts", GROUPED)
def test_groups_of_sparse_steps_keep_the_mean_density(steps, dense, counts):
    schedule = Schedule(steps, steps, 0, dense)
    groups = [schedule.group(step, 3) for step in range(dense, steps)]
    assert groups == sorted(groups) and tuple(map(groups.count, range(3))) == counts
    densities = falling_densities(0.3)
    if len(groups) > 1:
        assert sum(densities[group] for group in groups) / len(groups) == pytest.approx(0.3, rel=0.035)
    assert [schedule.group(step, 1) for step in range(steps)] == [0] * steps
    assert all(schedule.group(step, 3) == 0 for step in range(dense))


def test_every_recipe_follows_the_schema():
    schema = json.loads((FOLDER / "schema.json").read_text())
    files = [p for p in FOLDER.glob("*.json") if p.name != "schema.json"]
    assert {"wan", "flux"} <= {p.stem for p in files}
    for path in files:
        content = json.loads(path.read_text())
        jsonschema.validate(content, schema)
        assert content["family"] == path.stem
        densities = content["densities"]
        assert densities["quality"] >= densities["balanced"] >= densities["fast"]
        parse_blocks(content["dense_blocks"])
        Settings(precision=content["precision"]).validated()
    assert set(all_recipes()) == {p.stem for p in files}


def test_presets_come_from_the_recipe_unless_the_user_gives_a_density():
    recipe = recipe_for("wan")
    assert mask_options(Settings(preset="fast"), recipe).density == recipe.densities["fast"]
    assert mask_options(Settings(preset="fast", density=0.44), recipe).density == 0.44
    assert mask_options(Settings(tail="off"), recipe).pool is None
    assert mask_options(Settings(density=0.3), recipe).densities(0.3) == falling_densities(0.3)
    assert mask_options(Settings(density=0.3, density_schedule="constant"), recipe).densities(0.3) == (0.3,)
    for dense_steps, fall in ((0, STEEP_FALL), (1, FALL), (None, FALL)):
        found = mask_options(Settings(density=0.3, dense_steps=dense_steps), recipe).densities(0.3)
        assert found == falling_densities(0.3, fall) and found[0] / found[2] == pytest.approx(fall)
    never = mask_options(Settings(density=0.3, dense_steps=0, density_schedule="constant"), recipe)
    assert never.densities(0.3) == (0.3,)
    with pytest.raises(RecipeError, match="none for 'sora'; there are"):
        recipe_for("sora")
