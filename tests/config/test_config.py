"""Valid recipes: what is read, stored and derived."""

import dataclasses
import json
import subprocess
import sys

import pytest
import yaml

from relora_ds.config import (
    PACKAGE_DIR,
    Recipe,
    RecipeError,
    ReLoRAConfig,
    TrainConfig,
    accumulation_steps,
    load_recipe,
    method_of,
    preset_names,
    recipe_names,
    resolve_precision,
)

pytestmark = pytest.mark.usefixtures("base_recipe")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_round_trip(name, tmp_path):
    recipe = load_recipe(name, check_files=False)  # mini's text is collected by a script
    assert recipe.run_dir == f"runs/{name}"
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml", check_files=False) == recipe


def test_round_trip_of_everything_that_is_not_a_default(tmp_path):
    recipe = load_recipe(
        "base.yaml",
        [
            "resume=auto",
            "relora.target_modules=[q_proj,v_proj]",
            "relora.trainable_modules=[]",
            "optim.betas=[0.9,0.95]",
            "train.steps=null",
            "train.tokens=1.2e9",
            "data.validation=0.05",
            "run_dir=out",
            "relora.restart_every=null",
        ],
    )
    assert recipe.train.tokens == 1_200_000_000 and isinstance(recipe.train.tokens, int)
    assert recipe.relora.target_modules == ["q_proj", "v_proj"]
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "r.yaml") == dataclasses.replace(recipe, resume=False)  # it says how one start began


@pytest.mark.parametrize("override", ["overwrite=true", "resume=auto", "resume=runs/other"])
def test_how_one_start_began_is_not_part_of_the_stored_recipe(override, tmp_path):
    """Else starting `RUN/recipe.yaml` again, or a recipe that extends it, would delete the run or go on from it."""
    recipe = load_recipe("base.yaml", ["run_dir=out", override], check_files=False)
    assert recipe.resume or recipe.overwrite
    stored = yaml.safe_load(recipe.to_yaml())
    assert not {"resume", "overwrite"} & stored.keys()
    assert stored.keys() == {field.name for field in dataclasses.fields(Recipe)} - {"resume", "overwrite"}


def test_reading_a_recipe_imports_neither_torch_nor_deepspeed():
    code = (
        "import sys; from relora_ds.config import load_recipe; load_recipe('tiny'); "
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE_DIR.parent)


def test_scaling_is_pefts():
    assert ReLoRAConfig(r=64, lora_alpha=32).scaling == 0.5
    assert ReLoRAConfig(r=64, lora_alpha=32, use_rslora=True).scaling == 4


def test_modules_to_save_is_another_name_of_trainable_modules():
    config = ReLoRAConfig(modules_to_save=["lm_head"])
    assert config.trainable_modules == ["lm_head"] and "modules_to_save" not in dataclasses.asdict(config)
    assert dataclasses.replace(config, trainable_modules=["norm"]).trainable_modules == ["norm"]
    with pytest.raises(ValueError, match="two names of one setting"):
        ReLoRAConfig(modules_to_save=["lm_head"], trainable_modules=["norm"])
    recipe = load_recipe("base.yaml", ["relora.modules_to_save=[lm_head]"])
    assert recipe.relora.trainable_modules == ["lm_head"]


def test_names_may_come_as_a_set_or_a_tuple_and_are_a_list_for_checkpoints():
    config = ReLoRAConfig(target_modules={"v_proj", "q_proj"}, modules_to_save=("lm_head",))
    assert (config.target_modules, config.trainable_modules) == (["q_proj", "v_proj"], ["lm_head"])
    json.dumps(dataclasses.asdict(config))


def test_target_modules_may_be_a_regular_expression_and_empty_beside_parameters():
    assert load_recipe("base.yaml", [r"relora.target_modules=.*\.(q|v)_proj"]).relora.target_modules
    overrides = ["relora.target_modules=[]", "relora.target_parameters=[experts.down_proj]"]
    assert load_recipe("base.yaml", overrides).relora.target_parameters == ["experts.down_proj"]


def test_derived_values():
    recipe = load_recipe("base.yaml")
    assert (recipe.batch_sequences, recipe.tokens_per_step, recipe.total_steps) == (16, 2048, 600)
    method = method_of(recipe)
    assert (method.full_rank_steps, method.low_rank_steps, method.num_restarts) == (100, 500, 3)
    by_tokens = load_recipe(
        "base.yaml",
        ["train.steps=null", "train.tokens=1228801", "train.batch_sequences=null", "train.batch_tokens=2048"],
    )
    assert (by_tokens.batch_sequences, by_tokens.total_steps) == (16, 601)
    assert method_of(load_recipe("base.yaml", ["method=full"])).low_rank_steps == 0
    assert method_of(load_recipe("base.yaml", ["method=lora"])).low_rank_steps == 600
    assert method_of(load_recipe("base.yaml", ["method=lora", "lora.base=warm_start"])).low_rank_steps == 500
    assert Recipe(train=TrainConfig(tokens=10_000, batch_sequences=4)).total_steps == 10


def test_keys_of_earlier_versions_are_not_read(caplog):
    """They stand in the recipes of runs, which are resumed."""
    assert load_recipe("base.yaml", ["log.update_rank=false"]) == load_recipe("base.yaml") and not caplog.records
    load_recipe("base.yaml", ["log.update_rank=true"])
    assert [r.getMessage() for r in caplog.records] == [
        "log.update_rank: true is a key of an earlier version and has no effect"
    ]


def test_accumulation_steps():
    recipe = load_recipe("base.yaml", ["train.batch_sequences=96"])
    assert [accumulation_steps(recipe, n) for n in (1, 2, 3, 12)] == [12, 6, 4, 1]
    with pytest.raises(
        RecipeError,
        match=r"96 \(96 sequences\) cannot be split into 5 ranks × train.micro_batch_size "
        r"8; use train.batch_sequences=80 or train.batch_sequences=120",
    ):
        accumulation_steps(recipe, 5)
    with pytest.raises(RecipeError, match="train.batch_sequences=128 or train.micro_batch_size=6"):
        accumulation_steps(recipe, 16)


def test_precision():
    assert resolve_precision("auto", cuda_bf16=True) == "bf16"
    assert resolve_precision("auto", cuda_bf16=False) == "fp32"
    assert resolve_precision("fp16", cuda_bf16=True) == "fp16"


def test_presets_are_known_without_torch():
    assert {"tiny", "llama_20m", "llama_60m", "llama_1b_aligned", "llama_7b"} <= set(preset_names())
