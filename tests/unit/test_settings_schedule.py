"""Settings refuse nonsense by name; schedules know dense steps and blocks; recipes follow their schema."""

import json
import math

import jsonschema
import pytest
from comfyui_paro.paro_runtime.recipes import FOLDER, RecipeError, all_recipes, mask_options, recipe_for
from comfyui_paro.paro_runtime.schedule import Schedule, default_dense_steps, step_index
from comfyui_paro.paro_runtime.settings import Settings, SettingsError, in_blocks, parse_blocks

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
    ({"dense_blocks": "0, x"}, "dense_blocks"),
    ({"dense_blocks": "9-3"}, "dense_blocks"),
]


@pytest.mark.parametrize("change, field", WRONG)
def test_a_bad_setting_is_one_line_that_names_the_field(change, field):
    with pytest.raises(SettingsError, match=f"^{field}: ") as error:
        Settings(**change).validated()
    assert "\n" not in str(error.value)


def test_good_settings_pass():
    assert Settings().validated() == Settings()
    Settings(preset="custom", density=1.0, dense_blocks="0, 1, -1, 47-49", dense_steps=0).validated()


def test_blocks_count_from_both_ends():
    ranges = parse_blocks("0, 1, -1, 4-5")
    assert [i for i in range(10) if in_blocks(ranges, i, 10)] == [0, 1, 4, 5, 9]
    assert not in_blocks(ranges, 9, None)
    assert parse_blocks(" ") == ()


# sigmas, evaluation, step: an evaluation between two sigmas belongs to the step that it is part of
STEPS = [
    ([1.0, 0.75, 0.5, 0.25, 0.0], 1.0, 0),
    ([1.0, 0.75, 0.5, 0.25, 0.0], 0.75, 1),
    ([1.0, 0.75, 0.5, 0.25, 0.0], 0.6, 1),
    ([1.0, 0.75, 0.5, 0.25, 0.0], 0.7500001, 1),  # half precision moved it
    ([1.0, 0.75, 0.5, 0.25, 0.0], 0.0, 3),
    ([1.0, 0.75, 0.5, 0.25, 0.0], 1.3, 0),
    ([14.6, 3.1, 0.4, 0.03, 0.0], 0.031, 2),
    ([0.5], 0.5, 0),
]


@pytest.mark.parametrize("sigmas, sigma, step", STEPS)
def test_the_step_of_an_evaluation(sigmas, sigma, step):
    assert step_index(sigmas, sigma) == step


def test_dense_steps_follow_few_step_and_full_schedules():
    assert [default_dense_steps(n, 0.2) for n in (1, 4, 8, 20, 50)] == [1, 1, 2, 4, 10]
    schedule = Schedule.create(4, 9, "")
    assert all(schedule.is_dense_step(i) for i in range(4))


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
    with pytest.raises(RecipeError, match="none for 'sora'; there are"):
        recipe_for("sora")
