"""SwitchLoRA as a method of recipes: what its name stands for, and what does not go with it."""

import json

import pytest

from relora_ds.config import RecipeError, SwitchLoRAConfig, load_recipe, method_of, no_effect
from relora_ds.training.preflight import resolve

RECIPE = "llama_60m_switchlora"


def test_what_the_name_stands_for():
    recipe = load_recipe("llama_60m_full", ["method=switchlora", "switchlora.interval=20"])
    method = method_of(recipe)
    assert method.switching == SwitchLoRAConfig(interval=20) and method.is_low_rank and not method.is_chain
    assert (method.relora.scaling, method.relora.frozen_dtype) == (1 / recipe.relora.r, "fp32")
    assert (method.warm_start_steps, method.num_restarts) == (0, 0)
    assert method_of(load_recipe("llama_60m_relora")).switching is None


def test_a_restart_has_no_effect():
    recipe = load_recipe(RECIPE, ["relora.restart_every=1000", "relora.restart_warmup_steps=3"])
    assert method_of(recipe).relora.restart_every is None
    (warning,) = no_effect.warnings(recipe)
    assert warning.startswith("relora.restart_every: 1000 has no effect with method switchlora")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("relora.restart_init=random", "relora.restart_init: random has no effect with method switchlora"),
        ("relora.optimizer_reset=zero", "relora.optimizer_reset: zero has no effect with method switchlora"),
        ("switchlora.interval=5", "switchlora.freeze_steps: 5 is not below switchlora.interval 5: until fewer"),
    ],
)
def test_what_has_no_effect_or_not_the_expected_one(change, said):
    (warning,) = no_effect.warnings(load_recipe(RECIPE, [change]))
    assert warning.startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["relora.trains=B", "relora.restart_init=random"], "relora.trains: B has no rows of A to switch"),
        (["relora.frozen_dtype=bf16"], "relora.frozen_dtype: bf16 may round W at every switch"),
        (["relora.frozen_dtype=nf4"], "relora.frozen_dtype: nf4 may round W at every switch"),
        (["relora.lora_dropout=0.1"], "relora.lora_dropout: 0.1 acts on B·A alone"),
        (["relora.target_parameters=[experts.down_proj]"], "names experts in one parameter"),
        (["optim.name=adamw_8bit"], "optim.name: adamw_8bit keeps no step count for each vector"),
        (["optim.weight_decay=0.1"], "optim.weight_decay: 0.1 of B would have to act on W too"),
        (["warm_start_steps=100"], "warm_start_steps: 100 before method switchlora is not supported"),
        (["islands.count=2", "islands.address=host:1"], "islands.count: 2 with method switchlora"),
        (["switchlora.interval=0"], "switchlora.interval: 0 is not an integer of at least 1"),
        (["switchlora.ratio=1"], "switchlora.ratio: 1.0 is outside"),
        (["switchlora.freeze_steps=0"], "switchlora.freeze_steps: 0 is not an integer of at least 1"),
        (
            ["method=relora", "warm_start_method=switchlora", "warm_start_steps=1000", "relora.restart_every=1000"],
            "warm_start_method: switchlora switches vectors by a schedule that spans a whole run",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes, said):
    with pytest.raises(RecipeError) as error:
        load_recipe(RECIPE, changes)
    assert said in str(error.value)


def test_an_offloaded_optimizer_is_refused_before_anything_is_built(tmp_path):
    path = tmp_path / "offload.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    with pytest.raises(RecipeError, match="deepspeed: zero_optimization.offload_optimizer does not go with"):
        resolve(RECIPE, [f"deepspeed={path}"], 8, to_run=False)


def test_pieces_that_cut_a_number_are_refused_before_anything_is_built():
    changes = ["method=switchlora", "warm_start_steps=0", "relora.restart_every=null", "train.batch_sequences=12"]
    changes += ["deepspeed=zero3", "precision=bf16"]
    said = r"relora.frozen_placement: auto cuts .*q_proj .* on 3 ranks; use replicated, or another number of ranks"
    with pytest.raises(RecipeError, match=said):
        resolve("tiny", changes, 3, to_run=False)
    resolve("tiny", [*changes, "relora.frozen_placement=replicated"], 3, to_run=False)
