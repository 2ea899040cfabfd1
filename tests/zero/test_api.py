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
from tests.small_models import VOCAB, batch, llama

CONFIG = ReLoRAConfig(r=4, lora_alpha=8, restart_every=4, restart_warmup_steps=2)


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
        relora=CONFIG,
        training_data=Tokens(),
        lr=1e-2,
        total_steps=12,
        warmup_steps=2,
        min_lr_ratio=0.1,
        micro_batch_size=4,
        precision="fp32",
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


@pytest.mark.parametrize("stage", [1, 3, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 2))])
def test_own_loop(tmp_path, stage):
    result = ranks(2).run(own_loop, str(tmp_path), stage)[0]
    assert result["t"] == 8 and result["restarts"] == [4, 6, 8]
    assert result["multipliers"] == pytest.approx(
        [
            relora_ds.lr_multiplier(
                k, total_steps=12, warmup_steps=2, restart_warmup_steps=2, min_lr_ratio=0.1, restarts=[4, 6, 8]
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
    return relora_ds.initialize(
        model=model, config=f"zero{stage}", relora=CONFIG, lr=1e-2, total_steps=12, precision="bf16"
    )[0]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_rank_0s_weights_count_to_the_last_bit(stage):
    results = ranks(2).run(ranks_with_other_seeds, stage)
    for result in results:
        assert result["buffer"] == [0.0] * 3
        for name, parameter in llama(seed=0).named_parameters():
            assert torch.equal(result["merged"][name], parameter), name


def refused(changes: dict) -> str:
    arguments = dict(config="zero1", relora=CONFIG, lr=1e-2, total_steps=12)
    try:
        relora_ds.initialize(model=relora_ds.wrap(llama(), CONFIG), **{**arguments, **changes})
    except ValueError as error:
        return str(error)
    return "accepted"


def test_mistakes_are_named():
    [message] = ranks(1).run(
        refused,
        {
            "config": {
                "zero_optimization": {"stage": 1},
                "scheduler": {"type": "WarmupLR"},
                "optimizer": {"type": "Muon"},
            }
        },
    )
    assert "scheduler" in message and "Muon" in message
    [message] = ranks(1).run(refused, {"relora": None})
    assert "pass the ReLoRAConfig" in message


def test_public_names():
    for name in relora_ds.__all__:
        assert getattr(relora_ds, name) is not None
    assert VOCAB == 67
