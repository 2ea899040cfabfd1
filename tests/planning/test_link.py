"""Measuring a link, and what is recommended for it."""

import dataclasses
import time

import pytest
import torch

from relora_ds.planning.link import (
    Candidate,
    Link,
    Sample,
    flops_per_token,
    measure,
    micro_batches_to_try,
    predict,
    ranks_to_try,
    recommend,
)
from relora_ds.planning.network import Shapes
from tests.ranks import ranks


def measured(seconds: float) -> tuple[Link, float]:
    started = time.monotonic()
    link = measure(seconds, torch.device("cpu"))
    return link, time.monotonic() - started


def test_a_link_between_two_ranks():
    (link, seconds), (other, _) = ranks(2).run(measured, 4.0)
    assert link == other, "the ranks would take different decisions"
    assert seconds < 60  # about four, on an idle machine
    assert (link.world_size, link.backend) == (2, "gloo")
    sizes = [s.size for s in link.samples if s.collective == "all_reduce"]
    assert sizes == sorted(set(sizes)) and len(sizes) >= 3
    largest = max(link.samples, key=lambda s: (s.size, s.collective == "all_reduce"))
    # Two ranks: a ring all_reduce sends (n-1)/n twice, one payload altogether.
    assert link.bandwidth == largest.wire_per_second == largest.size / largest.seconds
    assert 1e-6 < link.latency < 1 and 1e6 < link.bandwidth < 1e12


def test_what_a_stage_gets_out_of_a_link():
    """3 GB of a step at stage 1: two are reduced at 2 GB/s, one is gathered at 0.5 GB/s."""
    link = Link(
        2,
        "gloo",
        (
            Sample("all_reduce", 4, 1.0, 1.0),
            Sample("all_gather", 4, 1.0, 1.0),
            Sample("all_reduce", 8, 1.0, 2e9),
            Sample("all_gather", 8, 1.0, 0.5e9),
        ),
    )
    assert [link.wire_per_second(stage) for stage in range(4)] == pytest.approx([2e9, 1e9, 1e9, 0.5e9])


def candidate(**changes) -> Candidate:
    values = dict(
        stage=1,
        r=128,
        micro_batch_size=8,
        memory=10,
        wire=100.0,
        tokens_per_step=1000,
        world_size=4,
        seconds_per_token=0.004,
        bandwidth=100.0,
    )
    return predict(**{**values, **changes})


def test_a_prediction_adds_compute_and_wire():
    found = candidate()
    assert (found.compute, found.communication, found.tokens_per_s) == (1.0, 1.0, 500.0)


def test_the_largest_r_that_does_not_wait_for_the_wire():
    large, half, small = candidate(r=128, wire=200), candidate(r=64, wire=90), candidate(r=32, wire=20)
    assert recommend([small, large, half], available=100) == half
    assert recommend([large, candidate(r=64, wire=150)], available=100).r == 64  # all wait: the smallest
    assert recommend([candidate(memory=101)], available=100) is None


def test_between_equals_the_lower_stage_and_the_larger_micro_batch():
    one, also, three = candidate(stage=1, micro_batch_size=4), candidate(stage=1), candidate(stage=3, wire=99)
    assert recommend([three, one, also], available=100) == also
    faster = candidate(stage=3, wire=10)
    assert recommend([also, faster], available=100) == faster


def test_a_frozen_weight_costs_four_flops_and_the_embedding_none():
    class config:  # noqa: N801
        num_hidden_layers, hidden_size = 2, 10

    shapes = Shapes(groups=((30, 20),), frozen=(100, 20), merged={}, factors=(), looked_up=(20, 0))
    assert flops_per_token(shapes, config, seq_len=5) == 6 * 30 + 4 * 120 + 6 * 2 * 10 * 5
    frozen = dataclasses.replace(shapes, looked_up=(0, 20))
    assert flops_per_token(frozen, config, seq_len=5) == 6 * 50 + 4 * 100 + 6 * 2 * 10 * 5


def test_what_is_tried():
    assert ranks_to_try(128) == [128, 64, 32, 16, 8] and ranks_to_try(4) == [4] and ranks_to_try(12) == [12]
    assert micro_batches_to_try(96, 8) == [1, 2, 4] and micro_batches_to_try(10, 3) == []
