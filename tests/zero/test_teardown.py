"""After a release nothing of the old engine is left, at every stage."""

import weakref

import pytest

from relora_ds.zero.teardown import release
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import batch
from tests.zero.live_tensors import live_bytes


def _watch(engine) -> dict[str, weakref.ref]:
    """Weak references to everything large. A function of its own, so that its loop variables hold nothing."""
    watched = {}
    for i, (_, flat) in enumerate(engine.shards._adapter.flats()):
        watched[f"master {i}"] = weakref.ref(flat)
        for key, value in engine.shards._adapter.inner.state[flat].items():
            watched[f"{key} {i}"] = weakref.ref(value)
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            watched[f"{name} partition"] = weakref.ref(parameter.ds_tensor)
    for name, master in engine.frozen.masters.items():
        watched[f"{name} frozen master"] = weakref.ref(master)
    for buffers in ("bit16_groups_flat", "single_partition_of_fp32_groups", "fp16_partitioned_groups_flat"):
        for i, buffer in enumerate(getattr(engine.optimizer, buffers, [])):
            watched[f"{buffers} {i}"] = weakref.ref(buffer)
    return watched


def build_and_release(stage, precision, offload=False, within_a_step=False, **relora) -> tuple[list[str], int, int]:
    """(names of tensors that are still alive, live bytes before and after)."""
    before = live_bytes()
    engine = cases.build(stage, precision=precision, offload=offload, relora=cases.relora_config(**relora))
    cases.train_step(engine, 0)
    cases.logits(engine)
    if within_a_step:  # as when a spike of its loss is seen
        tokens = batch(1, 2)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    watched = _watch(engine)
    release(engine)
    after = live_bytes()
    return [name for name, reference in watched.items() if reference() is not None], before, after


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    "stage, precision, offload",
    [
        (0, "fp32", False),
        (0, "bf16", False),
        (1, "bf16", False),
        (1, "fp32", True),
        (2, "bf16", False),
        (3, "fp32", False),
        (3, "bf16", False),
        (3, "bf16", True),
    ],
)
def test_nothing_survives_a_release(stage, precision, offload):
    _check(ranks(2).run(build_and_release, stage, precision, offload))


@pytest.mark.parametrize("frozen_dtype", ["auto", "int8"])
def test_frozen_weights_that_are_buffers_do_not_survive_it(frozen_dtype):
    _check(ranks(2).run(build_and_release, 3, "bf16", frozen_placement="replicated", frozen_dtype=frozen_dtype))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_that_is_given_up_leaves_no_gradients_and_no_sketches_of_them(stage):
    relora = dict(restart_init="gradient", restart_every=2, restart_warmup_steps=1)
    _check(ranks(2).run(build_and_release, stage, "fp32", within_a_step=True, **relora))


def _check(results) -> None:
    for alive, before, after in results:
        assert alive == []
        assert after - before < 2048
