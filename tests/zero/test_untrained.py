"""A wrapped layer that the first step does not reach is named, whatever the model is."""

import logging

import pytest
import torch
from torch import nn

import relora_ds
from relora_ds.config import ReLoRAConfig
from relora_ds.zero.teardown import release
from tests.ranks import ranks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.forgotten = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.used(x).square().mean()


def warnings_of(stage: int) -> list[str]:
    config, found = ReLoRAConfig(r=2, lora_alpha=4), []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("relora_ds.zero.step_checks")
    engine, *_ = relora_ds.initialize(
        relora_ds.wrap(Net(), config), f"zero{stage}", config, lr=1e-2, total_steps=3, precision="fp32"
    )
    logger.addHandler(handler)
    try:
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 6)))
            engine.step()
    finally:
        logger.removeHandler(handler)
        release(engine)
    return found


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_is_never_called_is_named_once(stage):
    ((message,),) = ranks(1).run(warnings_of, stage)
    assert "forgotten.0 (and 2 like it)" in message and "used," not in message and "exclude_modules" in message
