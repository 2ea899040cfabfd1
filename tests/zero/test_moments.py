"""Moments that are split over ranks are pruned as whole ones, also where many magnitudes are equal."""

import pytest
import torch

from relora_ds.zero.moments import prune_moments
from tests.parity import cases
from tests.parity.reference import prune
from tests.ranks import ranks

# With two equal layers the cut between two ranks would fall between two tensors at stages 1 and 2. And pruning
# 99.9 % at random, which passes for a full reset elsewhere, leaves nothing of a tensor below 500 entries.
SIZES = {"num_hidden_layers": 3, "hidden_size": 40}
R = 16


def prune_tied_moments(stage, reset) -> tuple[int, bool]:
    """Moments of a few distinct values, pruned split and whole; returns how many entries survive."""
    engine = cases.build(stage, relora=cases.relora_config(r=R), **SIZES)
    names = [name for name in engine.shards.names if "lora_" in name]
    for name in names:
        shard = engine.shards[name]
        index = torch.arange(shard.start, shard.stop)
        shard.exp_avg.write((index * 7919 % 5) - 2.0)
        shard.exp_avg_sq.write(index * 104729 % 3 + 1.0)
    split = any(0 < shard.stop - shard.start < shard.numel for shard in (engine.shards[name] for name in names))
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
    return kept, split


@pytest.mark.each_value_once
@pytest.mark.parametrize("reset", ["magnitude_joint", "magnitude", "zero"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_split_moments_are_pruned_as_whole_ones(stage, reset):
    (kept, split), (other, also_split) = ranks(2).run(prune_tied_moments, stage, reset)
    assert kept == other and (kept > 0) == (reset != "zero")
    assert split == also_split == (stage > 0), "no tensor lies on two ranks: the test would show nothing"
