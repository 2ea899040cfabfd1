"""Decoupled weight decay acts on W below the factors: the merged weights are those of plain PyTorch."""

import functools
from pathlib import Path

import pytest
import torch

import relora_ds
from relora_ds.checkpoint.model import CheckpointWeights
from relora_ds.lowrank.wrap import lowrank_layers, parameter_groups
from tests.parity import cases
from tests.parity.reference import ReferenceConv1D
from tests.ranks import ranks
from tests.small_models import batch, llama

SEEN = (8, 14)  # steps: in the first cycle, and in the second; the restart is after 11


def decayed(stage: int, relora, directory: str) -> dict:
    """Train, look at the merged weights in two cycles, save, and train on twice: as it is, and from the checkpoint."""
    engine = cases.build(stage, relora=relora)
    merged = {}
    for step in range(SEEN[-1]):
        cases.train_step(engine, step)
        if engine.t in SEEN:
            merged[engine.t] = engine.collect_merged()
    assert engine.restarts == [cases.EVERY]
    decay = float(engine.frozen.decay)
    assert decay != 1, "W does not decay"
    engine.save_checkpoint(directory, tag="now")
    losses = [cases.train_step(engine, step) for step in range(SEEN[-1], SEEN[-1] + 3)]
    last = engine.collect_merged()
    cases.release(engine)

    engine = cases.build(stage, relora=relora, model_seed=1)
    engine.load_checkpoint(directory, tag="now")
    assert float(engine.frozen.decay) == decay
    assert [cases.train_step(engine, step) for step in range(SEEN[-1], SEEN[-1] + 3)] == losses
    assert all(torch.equal(value, last[name]) for name, value in engine.collect_merged().items())
    cases.release(engine)
    return merged


@functools.cache
def plain_pytorch(one_sided: bool) -> dict[int, dict[str, torch.Tensor]]:
    reference = cases.make_reference("none", one_sided=one_sided)
    merged = {}
    for step in range(SEEN[-1]):
        reference.step(batch(step, cases.GLOBAL_BATCH))
        if reference.t == cases.EVERY:
            reference.restart()
        if reference.t in SEEN:
            merged[reference.t] = {
                f"{name}.weight": (layer.left * layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).detach()
                for name, layer in reference.layers.items()
                if not isinstance(layer, ReferenceConv1D)
            }
    return merged


@pytest.mark.parametrize(
    ("stage", "one_sided"),
    [
        *(pytest.param(stage, True, marks=pytest.mark.slow) for stage in (0, 1, 2)),
        (3, True),
        (1, False),
        pytest.param(3, False, marks=pytest.mark.slow),
    ],
)
def test_the_merged_weights_decay_as_in_plain_pytorch(tmp_path, stage, one_sided):
    relora = (cases.one_sided_config if one_sided else cases.relora_config)(optimizer_reset="none")
    merged = ranks(2).run(decayed, stage, relora, str(tmp_path))[0]
    for step, expected in plain_pytorch(one_sided).items():
        for name, value in expected.items():
            torch.testing.assert_close(merged[step][name], value, rtol=0, atol=1e-6, msg=f"after {step}: {name}")
    saved = CheckpointWeights(Path(tmp_path) / "now")
    assert all(torch.equal(saved.read(name), value) for name, value in merged[SEEN[-1]].items())


def bad_groups() -> str:
    model = relora_ds.wrap(llama(), cases.relora_config())
    groups = parameter_groups(model, weight_decay=0.1)
    last = {**groups[0], "params": [groups[0]["params"].pop()], "name": "other", "weight_decay": 0.2}
    settings = {"config": "zero1", "lr": 1e-3, "total_steps": 10, "precision": "fp32"}
    try:
        relora_ds.initialize(model, param_groups=[*groups, last], **settings)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_groups_that_disagree_on_the_decay_are_refused():
    assert ranks(1).run(bad_groups)[0].startswith("param_groups: lora_B is in 2 groups of different lr or weight_decay")


def test_nothing_decays_without_weight_decay():
    assert ranks(1).run(without_decay) == [(None, True)]


def without_decay() -> tuple:
    engine = cases.build(1, weight_decay=0.0)
    cases.train_step(engine, 0)
    found = engine.frozen.decay, all(layer.decay is None for layer in lowrank_layers(engine.module).values())
    cases.release(engine)
    return found
