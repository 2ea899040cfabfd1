"""Warnings: keys that have no effect, and settings that surprise."""

import pytest

from relora_ds.config import ReLoRAConfig, load_recipe, no_effect
from relora_ds.lowrank.storage import storage_warnings

pytestmark = pytest.mark.usefixtures("base_recipe")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["relora.restart_every=500"], "relora.restart_every: 500 is not below the 500 low-rank steps"),
        (["relora.restart_every=null"], "this run is LoRA on a frozen W"),
        (["method=full", "optim.warm_start_lr=null"], "warm_start_steps: 100 has no effect with method full"),
        (["lora.base=random"], "lora.base: random has no effect with method relora"),
        (["relora.optimizer_reset=magnitude"], "different masks"),
        (["relora.optimizer_reset=zero", "relora.reset_ratio=0.5"], "relora.reset_ratio: 0.5 has no effect"),
        (["optim.warm_start_warmup_steps=100"], "never reaches the peak"),
        (
            ["warm_start_method=lora", "warm_start_steps=0", "optim.warm_start_lr=null"],
            "warm_start_method: lora has no effect without a warm start",
        ),
        (
            ["method=lora", "lora.base=warm_start", "warm_start_method=relora", "relora.restart_every=100"],
            "warm_start_method: relora: relora.restart_every: 100 is not below the 100 low-rank steps: the run has no",
        ),
        (["optim.decay_steps=50"], "optim.decay_steps: 50 has no effect with optim.schedule cosine"),
        (
            ["optim.schedule=constant", "optim.min_lr_ratio=0.2"],
            "optim.min_lr_ratio: 0.2 has no effect with optim.schedule constant",
        ),
        (["optim.schedule=wsd", "optim.decay_steps=115", "data.split=x"], "data.split: x"),  # right up to the ramp
        (["data.split=x"], "data.split: x has no effect with data.source wikitext2"),
        (
            [
                "method=lora",
                "warm_start_steps=0",
                "relora.restart_every=null",
                "optim.warm_start_lr=null",
                "relora.frozen_dtype=nf4",
            ],
            "relora.frozen_dtype: nf4 has no effect with lora.base none",
        ),
    ],
)
def test_warnings(overrides, expected):
    found = no_effect.warnings(load_recipe("base.yaml", overrides))
    assert len(found) == 1 and expected in found[0], found


@pytest.mark.parametrize(
    ("options", "precision", "stage", "expected"),
    [
        (dict(frozen_dtype="nf4", frozen_double_quant=True), "bf16", 0, []),
        (dict(frozen_dtype="int8", frozen_placement="replicated", frozen_master="device"), "fp32", 1, []),
        (dict(frozen_placement="sharded"), "bf16", 3, []),
        (dict(frozen_placement="sharded"), "bf16", 2, ["frozen_placement: sharded has no effect at ZeRO stage 2"]),
        (dict(frozen_double_quant=True), "bf16", 0, ["frozen_double_quant: true has no effect with frozen_dtype auto"]),
        (dict(frozen_master="device"), "fp32", 0, ["frozen_master: device has no effect: W is stored in fp32"]),
        (dict(frozen_master="none", frozen_dtype="fp32"), "bf16", 0, ["frozen_master: none has no effect"]),
        (dict(frozen_master="none"), "bf16", 0, ["adds noise"]),
        (
            dict(frozen_master="none", frozen_dtype="nf4"),
            "bf16",
            0,
            ["rounded to nf4, and what is rounded away is lost"],
        ),
        (dict(frozen_master="none", frozen_dtype="nf4", restart_every=None), "bf16", 0, []),  # nothing is merged
    ],
)
def test_warnings_about_frozen_weights(options, precision, stage, expected):
    found = storage_warnings(ReLoRAConfig(**{"restart_every": 200, **options}), precision, stage)
    assert len(found) == len(expected), found
    assert all(words in text and text.startswith("relora.") for words, text in zip(expected, found, strict=True))
