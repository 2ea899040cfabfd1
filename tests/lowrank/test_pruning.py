"""Exact counts, ties, and the same mask however a tensor is split."""

import pytest
import torch

from relora_ds.lowrank.pruning import (
    count_ties,
    keep_mask,
    kth_largest_magnitude,
    magnitude_mask,
    num_kept,
    random_mask,
)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("numel", [1, 7, 1000, 100_003])
def test_mask_keeps_exactly_the_largest(numel, ratio):
    torch.manual_seed(numel)
    x = torch.randn(numel) * torch.logspace(-30, 3, numel)
    mask = magnitude_mask(x, ratio)
    assert mask.sum() == num_kept(numel, ratio)
    if 0 < mask.sum() < numel:
        assert x[mask].abs().min() > x[~mask].abs().max()


def test_ties_go_to_the_lowest_index_and_the_count_stays_exact():
    x = torch.tensor([1.0, -2.0, 1.0, 0.0, 2.0, -1.0, 1.0])
    assert magnitude_mask(x, 3 / 7).tolist() == [True, True, True, False, True, False, False]
    assert magnitude_mask(torch.zeros(1000), 0.99).nonzero().flatten().tolist() == list(range(10))
    assert magnitude_mask(torch.full((100,), -3.5), 0.9).sum() == 10


def test_a_split_tensor_gets_the_same_mask_as_a_whole_one():
    torch.manual_seed(0)
    whole = [torch.randn(1001).round(decimals=1), torch.zeros(10), torch.randn(3)]
    cuts = [(0, 400, 1001), (0, 10, 10), (0, 0, 3)]
    keep = [num_kept(w.numel(), 0.9) for w in whole]

    # Two "ranks" in lockstep: each histogram is summed over both. The first pass computes, per rank,
    # with a reduce that adds the other rank's histogram for the same digit.
    pieces = [[w[c[i] : c[i + 1]] for w, c in zip(whole, cuts, strict=True)] for i in range(2)]
    threshold, ties = kth_largest_magnitude(whole, keep)
    masks = []
    left = ties.clone()
    for rank in range(2):
        masks.append([keep_mask(p, t, n) for p, t, n in zip(pieces[rank], threshold, left, strict=True)])
        taken = torch.stack([count_ties(p, t) for p, t in zip(pieces[rank], threshold, strict=True)])
        left = (left - taken).clamp(min=0)
    for i, w in enumerate(whole):
        assert torch.equal(torch.cat([masks[0][i], masks[1][i]]), magnitude_mask(w, 0.9))


def test_random_mask_has_an_exact_count_and_follows_its_generator():
    first = random_mask(1000, 0.99, torch.Generator().manual_seed(1))
    assert first.sum() == 10
    assert torch.equal(first, random_mask(1000, 0.99, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, random_mask(1000, 0.99, torch.Generator().manual_seed(2)))
