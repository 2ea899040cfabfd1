"""Dropout masks: another one on every rank, in every step and micro-step, and the same one when a step is repeated."""

import torch
import torch.distributed as dist

from tests.parity import cases
from tests.ranks import ranks


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
