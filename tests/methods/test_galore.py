"""`method: galore` is a name for settings of a one-sided chain, which a recipe may set otherwise."""

import pytest

from relora_ds.config import RecipeError, load_recipe, method_of, no_effect
from relora_ds.config.methods import warm_start_of

SETTINGS = dict(trains="B", restart_every=200, restart_warmup_steps=0, restart_init="gradient", optimizer_reset="none")
RECIPE = "method: galore\nmodel: {preset: llama_20m}\ntrain: {steps: 2000, batch_sequences: 8}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def settings(recipe) -> dict:
    return {name: getattr(recipe.relora, name) for name in SETTINGS}


def test_the_name_stands_for_its_settings(write):
    recipe = load_recipe(write(RECIPE))
    assert settings(recipe) == SETTINGS and recipe.relora.scaling == 0.25
    method = method_of(recipe)
    assert method.num_restarts == 9 and method.warm_start_steps == 0 and not no_effect.warnings(recipe)


def test_what_the_recipe_sets_counts(write):
    path = write(RECIPE + "relora: {optimizer_reset: rotate}\n")
    changed = settings(load_recipe(path, ["relora.restart_init=random", "relora.restart_every=50"]))
    assert changed == {**SETTINGS, "optimizer_reset": "rotate", "restart_init": "random", "restart_every": 50}


def test_a_stored_recipe_says_all_of_it(write):
    stored = write(load_recipe(write(RECIPE)).to_yaml(), "stored.yaml")
    assert settings(load_recipe(stored, ["method=relora"])) == SETTINGS


def test_a_restart_inside_of_the_warm_up_needs_no_ramp(write):
    load_recipe(write(RECIPE), ["optim.warmup_steps=500"])
    with pytest.raises(RecipeError, match="relora.restart_every: 200 is not above optim.warmup_steps 500"):
        load_recipe(write(RECIPE), ["optim.warmup_steps=500", "relora.restart_warmup_steps=10"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("relora.trains=both", "relora.trains: both is not GaLore"),
        ("relora.restart_init=kaiming", "relora.trains: B needs an orthonormal A"),
        ("relora.restart_every=1", "relora.restart_every: 1 is not an integer of at least 2"),
    ],
)
def test_what_it_cannot_be(write, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(RECIPE), [override])


def test_rotating_needs_a_frozen_basis(write):
    with pytest.raises(RecipeError, match="relora.optimizer_reset: rotate turns B's moments"):
        load_recipe(write(RECIPE.replace("galore", "relora")), ["relora.optimizer_reset=rotate"])


def test_a_warm_start_by_it_and_of_it():
    before = warm_start_of(load_recipe("tiny", ["warm_start_method=galore"])).relora
    assert (before.trains, before.restart_init, before.restart_every, before.r) == ("B", "gradient", 200, 4)
    settings = ["method=galore", "warm_start_method=relora", "relora.restart_every=10"]
    before = warm_start_of(load_recipe("tiny", [*settings, "relora.restart_warmup_steps=1"])).relora
    assert (before.trains, before.restart_init, before.optimizer_reset) == ("both", "kaiming", "magnitude_joint")
    assert (before.restart_every, before.restart_warmup_steps) == (10, 1)
