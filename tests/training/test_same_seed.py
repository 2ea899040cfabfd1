"""The same seed gives the same losses, whatever the number of ranks and the ZeRO stage."""

import pytest
import torch
import torch.distributed as dist

import relora_ds
from relora_ds.config import ModelConfig, ReLoRAConfig
from relora_ds.models.build import model_without_values
from relora_ds.models.random_weights import RandomWeights
from relora_ds.zero.teardown import release
from tests.ranks import ranks
from tests.small_models import batch, llama

MICRO_BATCHES, STEPS = 6, 5
RELORA = ReLoRAConfig(r=4, lora_alpha=8, restart_every=2, restart_warmup_steps=1)


def losses(stage: int, seed: int) -> list[list[float]]:
    """Those of this rank's micro-batches, by step: the ranks divide the same six among themselves."""
    config = llama().config
    model = relora_ds.wrap(model_without_values(config, ModelConfig(attn_implementation="eager")), RELORA, seed=seed)
    size, rank = dist.get_world_size(), dist.get_rank()
    engine, *_ = relora_ds.initialize(
        model,
        f"zero{stage}",
        RELORA,
        lr=1e-3,
        total_steps=20,
        precision="fp32",
        micro_batch_size=2,
        seed=seed,
        gradient_accumulation_steps=MICRO_BATCHES // size,
        weights=RandomWeights(config, seed),
    )
    found = []
    for step in range(STEPS):
        found.append([])
        for micro_batch in range(rank, MICRO_BATCHES, size):
            ids = batch(MICRO_BATCHES * step + micro_batch, 2)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            found[-1].append(loss.item())
    assert engine.restarts == [2, 4]
    release(engine)
    return found


def of_all(world_size: int, stage: int, seed: int) -> list[list[float]]:
    """The losses of all micro-batches, in order, by step."""
    by_rank = ranks(world_size).run(losses, stage, seed)
    return [
        [by_rank[number % world_size][step][number // world_size] for number in range(MICRO_BATCHES)]
        for step in range(STEPS)
    ]


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    return of_all(1, 0, seed=5)


@pytest.mark.each_value_once
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_seed_gives_the_same_losses(expected, world_size, stage):
    found = of_all(world_size, stage, seed=5)
    assert found[0] == expected[0], "the initial weights differ"
    # From then on the sums of gradients are made in another order, and Adam divides by their square roots.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-6, atol=0)


def test_another_seed_gives_others(expected):
    assert not set(of_all(1, 0, seed=6)[0]) & set(expected[0])
