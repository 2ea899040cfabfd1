"""Gradients of owned weights are reduced while the last backward of a step computes those of the layers below."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import relora_ds
from relora_ds.config import ReLoRAConfig
from relora_ds.matrix.muon_update import Muon
from tests.parity import cases, owner
from tests.ranks import ranks
from tests.zero.restarts import BLOCKS

LR = 0.05


class Started:
    """The layers of which a reduction was started, since it was asked last."""

    def __init__(self, engine):
        sums = engine.owner_steps._sums
        self._names, start = [], sums._start

        def spy(name):
            self._names.append(name)
            start(name)

        sums._start = spy

    def take(self) -> list[str]:
        taken, self._names = self._names, []
        return taken


def started(stage, accumulation) -> list[list[str]]:
    """Of the second step: what each backward started, and what was left to `gather`."""
    engine = owner.build(stage, "muon", accumulation=accumulation, **BLOCKS)
    seen = Started(engine)
    cases.train_step(engine, 0)
    first, found = seen.take(), []
    tokens = cases.batch(1, cases.GLOBAL_BATCH).chunk(dist.get_world_size())[dist.get_rank()]
    for part in tokens.chunk(accumulation):
        engine.backward(engine(input_ids=part, labels=part).loss)
        found.append(seen.take())
        engine.step()
        left = seen.take()
    order = list(engine.frozen.layers)[::-1]
    assert sorted(first) == sorted(order), "once each"
    cases.release(engine)
    return [*found, left, order]


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 2), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_the_last_backward_of_a_step_reduces_layer_by_layer(stage, accumulation):
    for *earlier, last, left, order in ranks(2).run(started, stage, accumulation):
        assert not any(earlier) and last == order and left == []


class Twice(nn.Module):
    """Calls one linear twice, or as often as it is told, between two others."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.times, self.config = 2, None

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.times):
            x = torch.tanh(self.shared(x))
        return self.last(x).square().mean()


def made() -> Twice:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Twice()


def data(step: int) -> torch.Tensor:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(step))


def engine_of_twice():
    model = relora_ds.wrap(
        made(), ReLoRAConfig(trains="none", target_modules=["first", "shared", "last"], trainable_modules=["norms"])
    )
    settings = cases.ds_settings(0, "fp32")
    how = {"lr": LR, "total_steps": 10, "warmup_steps": 0, "schedule": "constant", "max_grad_norm": 0.0}
    engine, *_ = relora_ds.initialize(model, settings, micro_batch_size=1, matrix_optimizer=Muon(), **how)
    return engine


def trained_twice() -> tuple[list[str], dict[str, torch.Tensor]]:
    engine, found = engine_of_twice(), []
    seen = Started(engine)
    for step in range(3):
        seen.take()
        engine.backward(engine(data(step)[dist.get_rank()]))
        found = seen.take()
        engine.step()
    weights = engine.collect_merged()
    cases.release(engine)
    return found, weights


def test_a_layer_that_is_called_twice_is_reduced_when_it_is_complete():
    model = made()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    state = {name: Muon().begin(module.weight.shape) for name, module in linears.items()}
    adamw = torch.optim.AdamW([module.bias for module in linears.values()], lr=LR, weight_decay=0.0)
    for step in range(3):
        model(data(step)).backward()
        adamw.step()
        for name, module in linears.items():
            module.weight.data.add_(Muon().update(module.weight.grad, state[name], LR, name))
        model.zero_grad()
    for found, weights in ranks(2).run(trained_twice):
        assert found == ["last", "first"]
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.data, rtol=1e-4, atol=1e-5)


def called_again() -> str:
    engine = engine_of_twice()
    engine.module.times = 1
    try:
        for step in range(3):
            engine.module.times = 1 if step < 2 else 2
            engine.backward(engine(data(step)[dist.get_rank()]))
            engine.step()
    except RuntimeError as error:
        return str(error)
    finally:
        cases.release(engine)
    return "trained"


def test_a_gradient_that_comes_after_its_reduction_is_an_error():
    for said in ranks(2).run(called_again):
        assert "a backward has called shared once more than those of the first step" in said
