"""Pruning of split moments where many magnitudes are equal: the count stays exact and ties go to the lowest index."""

import pytest
import torch

from relora_ds.zero.moments import prune_moments
from tests.parity import cases
from tests.parity.reference import prune
from tests.ranks import ranks


def prune_tied_moments(stage, reset) -> int:
    """Moments of a few distinct values, pruned split and whole; returns how many entries survive."""
    engine = cases.build(stage)
    names = [name for name in engine.shards.names if "lora_" in name]
    for name in names:
        shard = engine.shards[name]
        index = torch.arange(shard.start, shard.stop)
        shard.exp_avg.copy_((index * 7919 % 5) - 2.0)
        shard.exp_avg_sq.copy_(index * 104729 % 3 + 1.0)
    before = cases.gathered_state(engine)
    fractions = prune_moments(engine.shards, names, reset, 0.7, seed=0, number=1, device=engine.device)
    after = cases.gathered_state(engine)
    kept = total = 0
    for name in names:
        m, v = before["exp_avg"][name], before["exp_avg_sq"][name]
        prune(m, v, reset, 0.7)
        assert torch.equal(after["exp_avg"][name], m) and torch.equal(after["exp_avg_sq"][name], v), name
        kept, total = kept + (v != 0).sum().item(), total + v.numel()
    assert fractions[1] == pytest.approx(1 - kept / total)
    cases.release(engine)
    return kept


@pytest.mark.parametrize("reset", ["magnitude_joint", "magnitude"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ties_across_ranks(stage, reset):
    kept, other = ranks(2).run(prune_tied_moments, stage, reset)
    assert kept == other > 0
