"""`relora_ds.initialize` in a loop of one's own, as the README shows it."""

import deepspeed
import pytest
import torch
from transformers import AutoModelForCausalLM

import relora_ds
from relora_ds import ReLoRAConfig
from relora_ds.zero.teardown import release
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import batch, llama

CONFIG = ReLoRAConfig(r=4, lora_alpha=8, restart_every=4, restart_warmup_steps=2)
SCHEDULES = {0: {"schedule": "linear"}, 1: {}, 2: {"schedule": "constant"}, 3: {"schedule": "wsd", "decay_steps": 2}}


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        tokens = batch(i, 1)[0]
        return {"input_ids": tokens, "labels": tokens}


def own_loop(directory, stage) -> dict:
    model = relora_ds.wrap(llama(), CONFIG)
    engine, optimizer, loader, scheduler = relora_ds.initialize(
        model=model,
        config=f"zero{stage}",
        training_data=Tokens(),
        lr=1e-2,
        total_steps=12,
        warmup_steps=2,
        min_lr_ratio=0.1,
        micro_batch_size=4,
        precision="fp32",
        **SCHEDULES[stage],
    )
    assert isinstance(engine, deepspeed.DeepSpeedEngine) and engine.module is model
    assert optimizer is engine.optimizer and scheduler is engine.lr_scheduler
    multipliers = []
    for step, tokens in enumerate(loader):
        multipliers.append(scheduler.get_last_lr()[0] / 1e-2)
        engine.backward(engine(**tokens).loss)
        engine.step()
        if step == 5:
            engine.restart()  # by hand: the ramp starts here
    logits = cases.logits(engine)
    engine.save_merged(directory)
    result = {"restarts": list(engine.restarts), "multipliers": multipliers, "logits": logits, "t": engine.t}
    release(engine)
    return result


@pytest.mark.parametrize("stage", [3, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1, 2))])
def test_own_loop(tmp_path, stage):
    result = ranks(2).run(own_loop, str(tmp_path), stage)[0]
    assert result["t"] == 8 and result["restarts"] == [4, 6, 8]
    assert result["multipliers"] == pytest.approx(
        [
            relora_ds.lr_multiplier(
                k,
                total_steps=12,
                warmup_steps=2,
                restart_warmup_steps=2,
                min_lr_ratio=0.1,
                restarts=[4, 6, 8],
                **SCHEDULES[stage],
            )
            for k in range(8)
        ]
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not any("lora" in name for name, _ in plain.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=batch(999, 4)).logits, result["logits"], rtol=1e-4, atol=1e-5)


def ranks_with_other_seeds(stage) -> dict:
    """Every rank builds another model; rank 0's must count, also for what only the masters hold."""
    rank = torch.distributed.get_rank()
    model = llama(seed=rank)
    model.register_buffer("constant", torch.full((3,), float(rank)))
    engine = cases_engine(relora_ds.wrap(model, CONFIG), stage)
    merged = engine.collect_merged()
    buffer = engine.module.constant.tolist()
    release(engine)
    return {"merged": merged, "buffer": buffer}


def cases_engine(model, stage):
    return relora_ds.initialize(model=model, config=f"zero{stage}", lr=1e-2, total_steps=12, precision="bf16")[0]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_rank_0s_weights_count_to_the_last_bit(stage):
    results = ranks(2).run(ranks_with_other_seeds, stage)
    for result in results:
        assert result["buffer"] == [0.0] * 3
        for name, parameter in llama(seed=0).named_parameters():
            assert torch.equal(result["merged"][name], parameter), name


def refused(changes: dict) -> str:
    arguments = dict(config="zero1", lr=1e-2, total_steps=12)
    try:
        relora_ds.initialize(model=relora_ds.wrap(llama(), CONFIG), **{**arguments, **changes})
    except ValueError as error:
        return str(error)
    return "accepted"


def with_optimizer(**values) -> dict:
    return {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": values}}


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"config": {"scheduler": {"type": "WarmupLR"}, "optimizer": {"type": "Muon"}}},
            ["config scheduler: ", 'config optimizer.type: "Muon"'],
        ),
        ({"config": "zero7"}, ["config: zero7 is neither a file nor a shipped configuration"]),
        ({"config": {"zero_optimization": {"stage": 1, "reduce_bucket_size": "x"}}}, ["config zero_optimization.red"]),
        ({"config": {"train_batch_size": 3}, "micro_batch_size": 2}, ["config train_batch_size: 3 is not 2 ="]),
        (
            {"config": with_optimizer(betas=[0.9, 0.95]), "betas": (0.9, 0.999)},
            ["config optimizer.params.betas: [0.9, 0.95] contradicts betas [0.9, 0.999]"],
        ),
        ({"config": with_optimizer(lr=0.1)}, ["config optimizer.params.lr: 0.1 contradicts lr 0.01"]),
        ({"config": with_optimizer(eps=1e-6), "eps": 1e-8}, ["config optimizer.params.eps: 1e-06 contradicts eps 1"]),
        (
            {"config": with_optimizer(weight_decay=0.1), "weight_decay": 0.0},
            ["config optimizer.params.weight_decay: 0.1 contradicts weight_decay 0.0"],
        ),
        (
            {"config": {"gradient_clipping": 0.5}, "max_grad_norm": 1.0},
            ["config gradient_clipping: 0.5 contradicts max_grad_norm 1.0"],
        ),
        (
            {"config": {"train_micro_batch_size_per_gpu": 4}, "micro_batch_size": 2},
            ["config train_micro_batch_size_per_gpu: 4 contradicts micro_batch_size 2"],
        ),
        (
            {"config": {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps": 2},
            ["config gradient_accumulation_steps: 4 contradicts gradient_accumulation_steps 2"],
        ),
        (
            {"config": {"bf16": {"enabled": True}}, "precision": "fp32"},
            ["config bf16.enabled: true contradicts precision fp32"],
        ),
        ({"optimizer": "adam8"}, ["optimizer: 'adam8' is not available; use 'adamw' or 'adamw_8bit'"]),
        (
            {"config": {"optimizer": {"type": "AdamW8bit"}}, "optimizer": "adamw"},
            ['config optimizer.type: "AdamW8bit" contradicts optimizer adamw; remove it'],
        ),
        ({"lr": None}, ["lr: not given, and config has no optimizer.params.lr; pass"]),
        ({"lr": -1.0}, ["lr: -1.0 is not a number >= 0"]),
        (
            {"total_steps": 0, "warmup_steps": -1, "min_lr_ratio": 2.0},
            ["total_steps: 0 is", "warmup_steps: -1 is", "min_lr_ratio: 2.0 is"],
        ),
        ({"schedule": "cosin"}, ["schedule: 'cosin' is unknown (did you mean cosine?); known: cosine, wsd, constant"]),
        ({"schedule": "wsd", "decay_steps": 0}, ["decay_steps: 0 is not a number of steps; use 1 or more, or None"]),
        ({"decay_steps": 2}, ["decay_steps: 2 has no effect with schedule cosine; leave it out"]),
        (
            {"schedule": "wsd", "decay_steps": 12},
            ["decay_steps: 12 of 12 steps begins the decay after step 0, before the ramp of the restart after step 8"],
        ),
        ({"betas": (0.9, 1.0)}, ["betas: [0.9, 1.0] are not two numbers in [0, 1)"]),
        ({"config": with_optimizer(betas=0.9)}, ["config optimizer.params.betas: 0.9 are not two numbers in [0, 1)"]),
        (
            {"relora": ReLoRAConfig(r=4, lora_alpha=8, restart_every=5, restart_warmup_steps=2)},
            ["relora: restart_every is 5, and 4 in the config that the model was wrapped with; leave it out"],
        ),
    ],
)
def test_mistakes_have_the_names_that_the_caller_wrote(changes, messages):
    [said] = ranks(1).run(refused, changes)
    for message in messages:
        assert any(line.startswith(message) for line in said.splitlines()), said
    for key in ("optim.", "train.micro", "recipe", "relora.", "deepspeed "):
        assert key not in said


def test_a_config_without_a_model_to_apply_it_to():
    assert "call relora_ds.wrap" in ranks(1).run(plain_with_a_config)[0]


def plain_with_a_config() -> str:
    try:
        relora_ds.initialize(llama(), "zero1", CONFIG, lr=1e-2, total_steps=12)
    except ValueError as error:
        return str(error)
    return "accepted"


JSON = {
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.2}},
    "gradient_clipping": 0.5,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 2,
    "bf16": {"enabled": True},
}


def settled(arguments: dict) -> dict:
    """What the engine trains with."""
    model = relora_ds.wrap(llama(), CONFIG)
    engine, *_ = relora_ds.initialize(model, total_steps=12, **arguments)
    group = engine.optimizer.param_groups[0]
    found = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    found["lr"] = engine.lr_scheduler.base_lrs[0]
    found |= {
        "clipping": engine.gradient_clipping(),
        "micro": engine.train_micro_batch_size_per_gpu(),
        "accumulation": engine.gradient_accumulation_steps(),
        "bf16": engine.bfloat16_enabled(),
        "restart_every": engine.relora.restart_every,
    }
    release(engine)
    return found


FROM_JSON = {
    "lr": 3e-3,
    "betas": (0.8, 0.95),
    "eps": 1e-6,
    "weight_decay": 0.2,
    "clipping": 0.5,
    "micro": 3,
    "accumulation": 2,
    "bf16": True,
    "restart_every": 4,
}
DEFAULTS = {
    "lr": 1e-2,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "clipping": 1.0,
    "micro": 1,
    "accumulation": 1,
    "bf16": False,
    "restart_every": 4,
}
AUTO = {
    **JSON,
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"config": JSON}, FROM_JSON),
        ({"config": JSON, "lr": 3e-3, "betas": (0.8, 0.95), "relora": CONFIG, "precision": "bf16"}, FROM_JSON),
        ({"config": "zero1", "lr": 1e-2}, DEFAULTS),
        ({"config": AUTO, "lr": 1e-2, "relora": CONFIG}, DEFAULTS),
    ],
    ids=["the JSON decides", "the same twice", "defaults", "auto"],
)
def test_what_is_not_passed_is_what_the_deepspeed_configuration_says(arguments, expected):
    assert ranks(1).run(settled, arguments)[0] == expected
