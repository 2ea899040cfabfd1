"""`relora.residual_every`: what it goes with, and what a mistake is told."""

import pytest

from relora_ds.config import RecipeError, ReLoRAConfig, load_recipe, method_of, no_effect
from relora_ds.config.methods import warm_start_of
from relora_ds.lowrank.storage import storage_problems

CHAIN = dict(trains="B", restart_init="random", restart_every=100, restart_warmup_steps=0)
GALORE = [
    "method=galore",
    "relora.residual_every=20",
    "relora.restart_every=200",
    "relora.restart_warmup_steps=0",
    "train.steps=2000",
    "optim.warmup_steps=10",
]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(residual_every=0), "residual_every: 0 is not an integer of at least 1; use e.g. 20"),
        (dict(residual_lr=0), "residual_lr: 0 is not a number above 0; use e.g. 0.08"),
        (dict(residual_every=20, residual_lr=-1.0), "residual_lr: -1.0 is not a number above 0"),
        (dict(residual_every=20, residual_lr="x"), "residual_lr: 'x' is not a number"),
        (
            dict(residual_every=30),
            "restart_every: 100 is not a multiple of ReLoRAConfig.residual_every 30, so the basis would change within "
            "a period; use ReLoRAConfig.restart_every=90 or ReLoRAConfig.restart_every=120",
        ),
        (
            dict(residual_every=200),
            "restart_every: 100 is not a multiple of ReLoRAConfig.residual_every 200, so the basis would change within "
            "a period; use ReLoRAConfig.restart_every=200",
        ),
        (
            dict(residual_every=20, trains="both"),
            "residual_every: 20 is for what a one-sided chain leaves out of the gradient; with ReLoRAConfig.trains "
            "both there is none; use ReLoRAConfig.trains=B, or ReLoRAConfig.residual_every=null",
        ),
        (
            dict(residual_every=20, lora_dropout=0.1),
            "residual_every: 20 needs the layer's own input, and ReLoRAConfig.lora_dropout 0.1 hides it; use "
            "ReLoRAConfig.lora_dropout=0",
        ),
    ],
)
def test_what_cannot_be(values, message):
    with pytest.raises(ValueError) as caught:
        ReLoRAConfig(**{**CHAIN, **values})
    assert str(caught.value).startswith(f"ReLoRAConfig.{message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [dict(residual_every=1), dict(residual_every=7, restart_every=None)])
def test_what_can_be(values):
    ReLoRAConfig(**{**CHAIN, **values})


def test_a_loss_scale_is_refused():
    (message,) = storage_problems(ReLoRAConfig(**CHAIN, residual_every=20), "fp16")
    assert message.startswith("relora.residual_every: 20 adds up gradients") and "use precision=bf16" in message
    assert not storage_problems(ReLoRAConfig(**CHAIN), "fp16")


def test_a_method_without_such_a_chain():
    with pytest.raises(RecipeError, match="relora.residual_every: 20 is for what a one-sided chain"):
        load_recipe("tiny", ["relora.residual_every=20"])
    recipe = load_recipe("tiny", [*GALORE, "method=lora", "relora.trains=B", "relora.restart_init=random"])
    assert method_of(recipe).relora.residual_every is None
    assert any(text.startswith("relora.residual_every: 20 has no effect") for text in no_effect.warnings(recipe))
    warm = warm_start_of(load_recipe("tiny", [*GALORE, "warm_start_method=relora"])).relora
    assert (warm.trains, warm.residual_every) == ("both", None)


def test_a_learning_rate_of_nothing_is_told():
    recipe = load_recipe("tiny", ["relora.residual_lr=0.1"])
    assert any(text.startswith("relora.residual_lr: 0.1 has no effect") for text in no_effect.warnings(recipe))
    assert not any("residual" in text for text in no_effect.warnings(load_recipe("tiny", GALORE)))


def test_another_speed():
    keys = [method_of(load_recipe("tiny", [*GALORE, f"relora.residual_every={n}"])).speed_key for n in ("null", "20")]
    assert keys[1] == [*keys[0], 20]
