"""A run with residual updates: its metrics, and the bytes of the steps that they follow."""

import pytest

from relora_ds.planning.cost import cost
from relora_ds.planning.network import network_of
from relora_ds.training.phases import phases_of
from relora_ds.training.preflight import resolve
from tests.training.runs import lines, run

CHANGES = [
    "method=galore",
    "model.preset=llama_20m",
    "warm_start_steps=0",
    "deepspeed=zero1",
    "precision=fp32",
    "train.steps=13",
    "optim.warmup_steps=1",
    "relora.restart_every=12",
    "relora.restart_warmup_steps=0",
    "relora.residual_every=4",
    "train.batch_sequences=2",
    "train.micro_batch_size=1",
    "log.every=1",
    "eval.samples=0",
]


def test_metrics_count_updates_and_their_bytes(tmp_path):
    run(tmp_path, *CHANGES)
    resolved = resolve("tiny", CHANGES, 2, to_run=False)
    (phase,) = phases_of(resolved.recipe)
    expected = cost(resolved, phase.method, network_of(resolved.recipe)[0])
    train = {line["step"]: line for line in lines(tmp_path, "train")}
    assert [train[step]["residual_updates"] for step in range(1, 14)] == [step // 4 for step in range(1, 14)]
    assert train[3]["residual_s"] == 0 < train[4]["residual_s"]
    for figure, step, update in zip(("bytes_payload", "bytes_wire"), expected.step, expected.residual, strict=True):
        for regular in (3, 5, 9, 13):
            assert train[regular][figure] == pytest.approx(step, rel=0.01)
        for with_update in (4, 8):  # counted, and known from then on
            assert train[with_update][figure] == pytest.approx(step + update, rel=0.01)
