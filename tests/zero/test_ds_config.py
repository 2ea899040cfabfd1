"""DeepSpeed configurations: what is refused, and what "auto" becomes."""

import json

import pytest

from relora_ds.zero import ds_config, ds_keys, ds_resolve

RECIPE = {"precision": "bf16", "micro_batch_size": 8, "accumulation": 2, "max_grad_norm": 1.0}


def resolve(config, **changes):
    arguments = {**RECIPE, "world_size": 2, "num_trainable": 100_001, **changes}
    return ds_resolve.resolve(ds_config.load(config), **arguments)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero1_offload", "zero3_offload"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_shipped_configurations_suit_any_recipe_and_deepspeed(name, precision):
    from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
    from deepspeed.runtime.zero.config import get_zero_config

    config = ds_config.load(name)
    found = ds_config.problems(config, **{**RECIPE, "precision": precision})
    if (name, precision) == ("zero0", "fp16"):  # DeepSpeed 0.19 does not scale the loss there
        assert len(found) == 1 and "fp16.enabled: true at stage 0" in found[0]
        return
    assert found == []
    assert ds_config.precision_of(config) is None
    resolved = resolve(name, precision=precision)
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 32 and resolved["gradient_clipping"] == 1.0
    assert get_bfloat16_config(resolved).enabled == (precision == "bf16")
    assert get_float16_config(resolved).enabled == (precision == "fp16")
    zero = get_zero_config(resolved)
    assert zero.stage == int(name[4]) and zero.reduce_bucket_size == zero.allgather_bucket_size == 100_002


def test_known_zero_keys_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    assert {field.alias or name for name, field in fields.items()} == ds_keys.ZERO_KEYS


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: 4 is not a stage; use 0, 1, 2 or 3"),
        ({"zero_optimization": True}, "zero_optimization: true is not an object"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device: nvme is not"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "no effect at stage 2; use stage 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "cpu has no effect at stage 0"),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "SuperOffload is not supported"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights: true, but ZeRO++"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients: true, but ZeRO++"),
        (
            {"zero_optimization": {"zero_quantized_nontrainable_weights": True}},
            "nontrainable_weights: true, but ZeRO++",
        ),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size: 8, but ZeRO++"),
        ({"zero_optimization": {"zenflow": {}}}, "zenflow: {}, but ZenFlow is not supported"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients: true, but"),
        ({"zero_optimization": {"elastic_checkpoint": True}}, "elastic_checkpoint: true, but"),
        ({"zero_optimization": {"reduce_bukket_size": 1}}, "unknown key (did you mean reduce_bucket_size?)"),
        ({"optimizer": {"type": "Muon"}}, 'optimizer.type: "Muon" is not available; only AdamW and AdamW8bit are'),
        (
            {"optimizer": {"type": "AdamW8bit", "params": {"fused": True}}},
            "optimizer.params.fused: true is not available",
        ),
        ({"optimizer": {"type": "OneBitAdam"}}, 'optimizer.type: "OneBitAdam" is not available'),
        ({"optimizer": {"type": "ZeroOneAdam"}}, 'optimizer.type: "ZeroOneAdam" is not available'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "optimizer.params.lr: 0.1 contradicts optim.lr 0.01"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode: false is not available"),
        ({"scheduler": {"type": "WarmupLR"}}, "the learning rate must follow the restarts; remove it"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled: true, but"),
        ({"pipeline": {"stages": 2}}, "pipeline parallelism is not supported"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp is not supported"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "merging needs fp32 masters"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "merging needs fp32 masters"),
        ({"bf16": {"enabled": False}}, 'bf16.enabled: false contradicts precision bf16; use "auto"'),
        ({"fp16": {"enabled": True}}, "fp16.enabled: true contradicts precision bf16"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu: 4 contradicts train.micro_batch_size 8",
        ),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4 contradicts the recipe's accumulation 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5 contradicts optim.max_grad_norm 1.0"),
        ({"gradient_cliping": 1.0}, "gradient_cliping: unknown key (did you mean gradient_clipping?)"),
        ({"communication_data_type": "auto"}, 'communication_data_type: "auto", but nothing fills it in'),
    ],
)
def test_one_problem_gives_one_message(config, expected):
    found = ds_config.problems(config, **RECIPE, lr=0.01)
    assert len(found) == 1 and expected in found[0] and found[0].startswith("deepspeed "), found


def test_the_type_of_the_optimizer_agrees_with_the_recipe():
    in_8_bit = {"optimizer": {"type": "AdamW8bit", "params": {"betas": [0.9, 0.95]}}}
    assert ds_config.problems(in_8_bit) == ds_config.problems(in_8_bit, optimizer="adamw_8bit") == []
    [message] = ds_config.problems(in_8_bit, optimizer="adamw")
    assert message.startswith('deepspeed optimizer.type: "AdamW8bit" contradicts optim.name adamw; remove it')
    forced = {"zero_force_ds_cpu_optimizer": True}
    for config, name in ((forced, "adamw_8bit"), ({**forced, **in_8_bit}, None)):
        [message] = ds_config.problems(config, optimizer=name)
        assert message.startswith("deepspeed zero_force_ds_cpu_optimizer: true asks for DeepSpeed's CPU Adam")


def test_all_problems_at_once():
    config = {
        "bf16": {"enabled": True},
        "fp16": {"enabled": True},
        "scheduler": {"type": "WarmupLR"},
        "typo": 1,
        "zero_optimization": {"stage": 1, "zenflow": {}},
    }
    found = ds_config.problems(config)
    assert len(found) == 4 and any("both true" in message for message in found)
    with pytest.raises(ValueError, match="(?s)typo.*scheduler.*zenflow.*both true"):
        resolve(config)


def test_what_agrees_with_the_recipe_is_no_problem():
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "torch_adam": True}},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "none"}},
    }
    assert ds_config.problems(config, **RECIPE, lr=1.0, betas=(0.9, 0.999)) == []


def test_given_values_stay_and_the_input_is_not_changed():
    config = {
        "gradient_clipping": 0.5,
        "steps_per_print": 7,
        "train_batch_size": 64,
        "optimizer": {"type": "Adam"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 11,
            "stage3_max_live_parameters": 5,
            "stage3_gather_16bit_weights_on_model_save": True,
            "overlap_comm": "auto",
        },
    }
    before = json.dumps(config)
    resolved = ds_resolve.resolve(
        config,
        precision="bf16",
        micro_batch_size=8,
        accumulation=None,
        world_size=2,
        max_grad_norm=1.0,
        num_trainable=10,
    )
    assert json.dumps(config) == before
    zero = resolved["zero_optimization"]
    assert (resolved["gradient_clipping"], resolved["steps_per_print"], zero["reduce_bucket_size"]) == (0.5, 7, 11)
    assert zero["stage3_max_live_parameters"] == 5 and zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert resolved["gradient_accumulation_steps"] == 4 and "optimizer" not in resolved and "overlap_comm" not in zero
    assert resolve("zero3", cpu=True)["zero_optimization"]["overlap_comm"] is False
    with pytest.raises(ValueError, match="train_batch_size: 64 is not 32 = micro-batch 8 × accumulation 2 × 2 ranks"):
        resolve({"train_batch_size": 64})


def test_sizes_follow_what_trains():
    def sizes(num_trainable):
        zero = resolve("zero3", num_trainable=num_trainable)["zero_optimization"]
        return zero["reduce_bucket_size"], zero["stage3_param_persistence_threshold"]

    assert sizes(0) == (2, 0)
    assert sizes(1_000_001) == (1_000_002, 10_000)
    assert sizes(10**10) == (50_000_000, 100_000)


def test_deepspeeds_throughput_timer_is_off_unless_it_is_asked_for():
    """It waits for the GPU twice in every micro-step."""
    from deepspeed.utils.config import get_timers_config

    assert not get_timers_config(resolve("zero1")).enabled
    asked = {"zero_optimization": {"stage": 1}, "timers": {"throughput": {"synchronized": False}}}
    assert get_timers_config(resolve(asked)).enabled and not get_timers_config(resolve(asked)).synchronized


def test_load(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 1, "stage": 2}}')
    with pytest.raises(ValueError, match="key given twice: stage"):
        ds_config.load(str(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ds_config.load(path)
    with pytest.raises(ValueError, match=r"zero_1 is neither .* \(did you mean zero1\?\); shipped: zero0, zero1"):
        ds_config.load("zero_1")


def test_precision_of():
    assert ds_config.precision_of({"bfloat16": {"enabled": True}}) == "bf16"
    assert ds_config.precision_of({"fp16": {"enabled": True}, "bf16": {"enabled": False}}) == "fp16"
    assert ds_config.precision_of({"bf16": {"enabled": False}}) == "fp32"
    assert ds_config.precision_of({}) is None
