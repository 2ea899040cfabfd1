"""Dropout masks: another one on every rank, in every step and micro-step, and the same one when a step is repeated.

And what else forward draws: the same layers on every rank, and nothing from the program's own generators.
"""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

import relora_ds
from relora_ds import ReLoRAConfig
from relora_ds.lowrank.wrap import wrap
from relora_ds.models import recompute
from relora_ds.zero.randomness import drops_values_only
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import VOCAB, batch, llama


def outputs() -> dict[str, torch.Tensor]:
    """Logits of one batch that all ranks share: they differ only where the masks do."""
    engine = cases.build(1, accumulation=2, relora=cases.relora_config(lora_dropout=0.5))
    for step in range(3):
        cases.train_step(engine, step)  # until B is not 0 and the masks show
    tokens = cases.batch(999, 4)
    found = {"eval": cases.logits(engine)}
    for when in ("first", "again"):
        found[when] = engine(input_ids=tokens).logits.detach().clone()
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()  # not the last micro-step: no update
    found["next micro-step"] = engine(input_ids=tokens).logits.detach().clone()
    found["eval again"] = cases.logits(engine)
    cases.release(engine)
    assert dist.get_world_size() == 2
    return found


def test_masks_differ_between_ranks_and_micro_steps_and_repeat():
    mine, theirs = ranks(2).run(outputs)
    assert torch.equal(mine["eval"], theirs["eval"]) and torch.equal(mine["eval"], mine["eval again"])
    assert not torch.allclose(mine["first"], mine["eval"]), "no dropout at all"
    assert not torch.allclose(mine["first"], theirs["first"]), "the same mask on every rank"
    assert not torch.allclose(mine["first"], mine["next micro-step"]), "the same mask in every micro-step"
    assert torch.equal(mine["first"], mine["again"]) and torch.equal(theirs["first"], theirs["again"])
    repeated = ranks(2).run(outputs)[0]
    assert torch.equal(mine["first"], repeated["first"]), "another mask in another run of the same seed"


def states() -> tuple:
    return torch.initial_seed(), torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def changed_generators(stage: int, mode: str, lora_dropout: float) -> list[str]:
    """After which parts of a step a generator of the program is in another state."""
    relora = cases.relora_config(lora_dropout=lora_dropout)
    model = recompute.apply(relora_ds.wrap(llama(attention_dropout=0.1), relora), mode)
    engine, *_ = relora_ds.initialize(model, cases.ds_settings(stage, "fp32"), relora, lr=1e-2, total_steps=9)
    torch.manual_seed(1234 + dist.get_rank())
    tokens, before, found = batch(0, 3), states(), []

    def check(what: str) -> None:
        if states() != before:
            found.append(what)

    for step in range(2):
        loss = engine(input_ids=tokens, labels=tokens).loss
        check(f"forward {step}")
        engine.backward(loss)
        check(f"backward {step}")
        engine.step()
        check(f"step {step}")
    with pytest.raises(IndexError):
        engine(input_ids=torch.full_like(tokens, VOCAB))
    check("a forward that raises")
    cases.release(engine)
    return found


@pytest.mark.parametrize("stage, mode, lora_dropout", [(0, "none", 0.0), (1, "full", 0.3), (3, "cheap", 0.3)])
def test_a_step_leaves_the_programs_generators_alone(stage, mode, lora_dropout):
    assert ranks(1).run(changed_generators, stage, mode, lora_dropout) == [[]]


class Draws(nn.Module):
    """Draws from every generator of the host, and records it."""

    def __init__(self):
        super().__init__()
        self.linear, self.drawn = nn.Linear(8, 8), []

    def forward(self, x):
        self.drawn.append((random.random(), torch.rand(()).item()))
        return self.linear(x).sum()


def draws(dropout: float) -> list[tuple[float, float]]:
    """What a forward draws in three steps; before the second one of them, the program seeds its generators anew."""
    model = Draws()
    model.dropout = nn.Dropout(dropout)
    engine, *_ = relora_ds.initialize(model, cases.ds_settings(0, "fp32"), lr=1e-2, total_steps=9)
    for step in range(3):
        if step == 1:
            random.seed(7), torch.manual_seed(7)
        engine.backward(engine(torch.ones(2, 8)))
        engine.step()
    cases.release(engine)
    return model.drawn


def test_other_draws_repeat_and_are_the_same_on_every_rank():
    mine, theirs = ranks(2).run(draws, 0.0)
    assert len(set(mine)) == 3 and mine == theirs
    assert ranks(2).run(draws, 0.0) == [mine, theirs]
    mine, theirs = ranks(2).run(draws, 0.5)
    assert [python for python, _ in mine] == [python for python, _ in theirs]
    assert all(one != other for (_, one), (_, other) in zip(mine, theirs, strict=True)), "the masks' generator"


def opt(**changes):
    return AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            dropout=0.1,
            **changes,
        )
    )


def layers_that_ran(stage: int) -> list[list[int]]:
    """The layers of every step, with LayerDrop."""
    torch.manual_seed(dist.get_rank())
    relora = cases.relora_config(lora_dropout=0.1, restart_every=3, restart_warmup_steps=1)
    model = relora_ds.wrap(opt(layerdrop=0.5), relora)
    engine, *_ = relora_ds.initialize(
        model,
        cases.ds_settings(stage, "fp32"),
        relora,
        lr=1e-2,
        total_steps=6,
        micro_batch_size=cases.GLOBAL_BATCH // 2,
    )
    found = []
    for number, layer in enumerate(engine.module.model.decoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: found[-1].append(number))
    for step in range(6):
        found.append([])
        cases.train_step(engine, step)
    cases.release(engine)
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_layer_drop_drops_the_same_layers_on_every_rank(stage):
    mine, theirs = ranks(2).run(layers_that_ran, stage, timeout=120)
    assert mine == theirs and len({tuple(step) for step in mine}) > 3


def test_which_models_drop_values_and_no_layers():
    assert not drops_values_only(llama()) and not drops_values_only(nn.Linear(2, 2))
    assert drops_values_only(llama(attention_dropout=0.1)) and drops_values_only(nn.Dropout(0.1))
    assert drops_values_only(wrap(llama(), ReLoRAConfig(r=4, lora_dropout=0.1)))
    assert drops_values_only(opt()) and not drops_values_only(opt(layerdrop=0.1))
