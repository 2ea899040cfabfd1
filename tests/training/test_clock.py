"""Seconds of steps on a device that goes on after they return."""

import types

import pytest
import torch

from relora_ds.training import clock as clocks
from relora_ds.training.clock import StepClock
from relora_ds.training.totals import RunTotals


class Gpu:
    """A pretended GPU: giving it a step takes the host a second, the step takes it `busy` seconds."""

    def __init__(self, monkeypatch):
        self.now = self.free_at = 0.0
        self.waits = 0
        monkeypatch.setattr(clocks, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        self.totals = RunTotals()
        self.clock = StepClock(torch.device("cuda", 0), self.totals)

    def synchronize(self, device) -> None:
        self.waits += 1
        self.now = max(self.now, self.free_at)

    def step(self, busy: float, sampled: bool = False) -> None:
        with self.clock.step(sampled):
            self.now += 1
            self.free_at = max(self.now, self.free_at) + busy


def test_the_mean_is_that_of_the_device_with_one_wait_for_many_steps(monkeypatch):
    gpu = Gpu(monkeypatch)
    for _ in range(10):
        gpu.step(busy=3)
    assert gpu.waits == 0 and gpu.totals.seconds == 10
    assert gpu.clock.mean_seconds() == pytest.approx(31 / 10)
    assert gpu.waits == 1 and gpu.totals.seconds == 31 and gpu.clock.newest == 22


def test_what_the_device_does_after_the_last_wait_is_in_the_next_mean(monkeypatch):
    gpu = Gpu(monkeypatch)
    for _ in range(2):
        for _ in range(5):
            gpu.step(busy=3)
        assert gpu.clock.mean_seconds() == pytest.approx(16 / 5)
    gpu.step(busy=3)
    gpu.clock.drain()  # as before an evaluation,
    gpu.now += 100  # whose seconds are nobody's
    gpu.step(busy=3)
    assert gpu.clock.mean_seconds() == pytest.approx(4) and gpu.totals.seconds == 32 + 8


def test_a_sampled_step_is_timed_apart(monkeypatch):
    gpu = Gpu(monkeypatch)
    gpu.step(busy=3)
    gpu.step(busy=50, sampled=True)
    assert gpu.clock.newest == 51 and gpu.totals.seconds == 4 + 51
    gpu.step(busy=3)
    assert gpu.clock.mean_seconds() == pytest.approx(4)


def test_where_all_steps_were_sampled_the_former_mean_stands(monkeypatch):
    gpu = Gpu(monkeypatch)
    gpu.step(busy=9, sampled=True)
    assert gpu.clock.mean_seconds() == 10  # there is no other yet
    gpu.step(busy=3)
    assert gpu.clock.mean_seconds() == 4
    gpu.step(busy=50, sampled=True)
    assert gpu.clock.mean_seconds() == 4


def test_a_cpu_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("it was"))
    clock = StepClock(torch.device("cpu"), RunTotals())
    with clock.step(sampled=True):
        pass
    assert clock.mean_seconds() == clock.newest >= 0
