"""`engine.save_checkpoint` and `load_checkpoint` between two restarts: training resumes as if never interrupted.

The restart after the load is what tells: it merges into the fp32 masters of the frozen weights.
"""

from pathlib import Path

import pytest
import torch.distributed as dist

from relora_ds.checkpoint.tensors import SavedTensors
from tests.parity import cases
from tests.ranks import ranks
from tests.zero.restarts import fingerprint
from tests.zero.test_nonfinite import everything

EVERY, SAVED_AT, END = 4, 6, 11  # restarts at 4 and 8; three steps after the second


def build(stage, precision, lora_dropout=0.0, frozen=None, **how):
    relora = cases.relora_config(
        restart_every=EVERY, restart_warmup_steps=2, lora_dropout=lora_dropout, **(frozen or {})
    )
    return cases.build(stage, precision=precision, relora=relora, **how)


def train(engine, start: int, stop: int) -> list[float]:
    return [cases.train_step(engine, step) for step in range(start, stop)]


def saved_run(stage, precision, directory: str, **how) -> dict:
    """Save at SAVED_AT and go on to the end; returns the state that was saved and what came after."""
    engine = build(stage, precision, **how)
    train(engine, 0, SAVED_AT)
    saved = everything(engine)
    engine.save_checkpoint(directory)
    assert everything(engine) == saved, "saving changed the engine"
    result = {
        "saved": saved,
        "losses": train(engine, SAVED_AT, END),
        "restarts": list(engine.restarts),
        "end": everything(engine),
        "merge_loss_total": engine.last_restart.merge_loss_total,
    }
    cases.release(engine)
    return result


def resumed_run(stage, precision, directory: str, steps_before: int, **how) -> dict:
    """Another model's engine, stepped a few times on other data, loads the checkpoint and goes on."""
    engine = build(stage, precision, model_seed=1, **how)
    train(engine, 100, 100 + steps_before)
    other = everything(engine)
    engine.load_checkpoint(directory)
    saved = everything(engine)
    assert not {"master", "forward", "stored"} & {what for what in saved if saved[what] == other[what]}, (
        "the other engine was the same to begin with: the test would show nothing"
    )
    result = {
        "saved": saved,
        "losses": train(engine, SAVED_AT, END),
        "restarts": list(engine.restarts),
        "end": everything(engine),
        "merge_loss_total": engine.last_restart.merge_loss_total,
    }
    cases.release(engine)
    return result


def check(stage, precision, directory: str, own_steps: tuple[int, ...] = (0,), **how) -> None:
    expected = ranks(2).run(saved_run, stage, precision, directory, **how)
    assert expected[0]["restarts"] == [4, 8]
    for steps_before in own_steps:
        for rank, result in enumerate(ranks(2).run(resumed_run, stage, precision, directory, steps_before, **how)):
            for what, value in expected[rank].items():
                assert result[what] == value, f"rank {rank}, after {steps_before} steps of its own: {what} differs"


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_resume_is_exact_through_the_next_restart(stage, tmp_path):
    check(stage, "fp32", str(tmp_path))


def read_while_loaded(stage, directory: str) -> tuple[set[str], set[str]]:
    """What a rank reads of the frozen weights, and what it owns."""
    engine, read = build(stage, "bf16"), set()
    engine.save_checkpoint(directory)
    usual = SavedTensors.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SavedTensors, "read", lambda self, name: read.add(name) or usual(self, name))
        engine.load_checkpoint(directory)
    owned = {f"{name}.weight" for name in engine.frozen.owned()}
    cases.release(engine)
    return {name for name in read if name.endswith(".weight")}, owned


@pytest.mark.parametrize(
    ("stage", "precision", "frozen"),
    [
        (1, "fp32", dict(gradient_estimate="exact")),
        (3, "bf16", dict(gradient_estimate="warm_sketch")),
        (3, "bf16", dict(frozen_dtype="int8", frozen_placement="replicated")),
    ],
)
def test_a_one_sided_chain_resumes_to_the_bit(stage, precision, frozen, tmp_path):
    """With its basis, which is frozen for a cycle, and the moments that the next one is computed from."""
    one_sided = dict(trains="B", restart_init="gradient", optimizer_reset="rotate")
    check(stage, precision, str(tmp_path), frozen={**one_sided, **frozen})


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_reads_the_frozen_weights_that_it_owns(stage, tmp_path):
    for read, owned in ranks(2).run(read_while_loaded, stage, str(tmp_path)):
        assert read == owned


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
def test_resume_is_exact_in_bf16_also_in_an_engine_that_has_trained(stage, tmp_path):
    check(stage, "bf16", str(tmp_path), own_steps=(0, 5))  # five: past a restart of its own


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_with_the_optimizer_on_cpu(stage, tmp_path):
    check(stage, "bf16", str(tmp_path), offload=True)


def test_dropout_masks_are_the_same_after_a_resume(tmp_path):
    check(1, "fp32", str(tmp_path), lora_dropout=0.5)


def save_without_frozen_parameters(directory: str) -> str:
    engine = build(1, "fp32")
    try:
        engine.save_checkpoint(directory, exclude_frozen_parameters=True)
    except ValueError as error:
        return str(error)
    finally:
        cases.release(engine)
    return ""


def test_leaving_out_the_frozen_parameters_is_an_error(tmp_path):
    for message in ranks(2).run(save_without_frozen_parameters, str(tmp_path)):
        assert "would lose every merge" in message
    assert not any(tmp_path.iterdir()), "something was written nevertheless"


def load_into_another_network(directory: str) -> str:
    engine = build(1, "fp32")
    engine.save_checkpoint(directory)
    cases.release(engine)
    engine = build(3, "bf16", intermediate_size=40)
    before = everything(engine)
    try:
        engine.load_checkpoint(directory)
    except ValueError as error:
        assert everything(engine) == before
        return str(error)
    finally:
        cases.release(engine)
    return ""


def test_a_checkpoint_of_another_network_is_refused_before_anything_is_loaded(tmp_path):
    for message in ranks(2).run(load_into_another_network, str(tmp_path)):
        assert "does not fit: " in message and "lora_A, was {'shape': [4, " in message


def load_from_disks_of_their_own(directory: str) -> tuple:
    """`latest` is where rank 0 wrote it; rank 1 sees the other files, and would start from nothing."""
    engine = build(1, "bf16")
    engine.save_checkpoint(directory, tag="t")
    dist.barrier()
    own = Path(directory)
    if dist.get_rank() == 1:
        own = Path(f"{directory}_of_rank_1")
        own.mkdir()
        (own / "t").symlink_to(Path(directory, "t"))
    loaded = engine.load_checkpoint(str(own))
    nothing = engine.load_checkpoint(str(own / "t"))
    cases.release(engine)
    return loaded[0] is not None, nothing[0]


def test_the_newest_checkpoint_is_the_one_that_rank_0_sees(tmp_path):
    assert ranks(2).run(load_from_disks_of_their_own, str(tmp_path / "checkpoints")) == [(True, None)] * 2


def save_merged_into_a_file(directory: str) -> str:
    engine = build(1, "fp32")
    try:
        engine.save_merged(f"{directory}/file/model")
    except OSError as error:
        return str(error)
    finally:
        cases.release(engine)
    return ""


def test_a_model_that_rank_0_cannot_write_is_an_error_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("")
    for message in ranks(2).run(save_merged_into_a_file, str(tmp_path)):
        assert message.startswith("save_merged: ") and "file/model: rank 0: " in message


ONE_SIDED = dict(trains="B", restart_init="random", optimizer_reset="none")


def saved_after(steps: int, stage: int, directory: str, **frozen) -> None:
    engine = build(stage, "fp32", frozen=frozen)
    train(engine, 0, steps)
    engine.save_checkpoint(directory)
    cases.release(engine)


def in_another_chain(steps: int, stage: int, directory: str, **frozen) -> dict:
    """The losses of the plain model in the checkpoint, and of an engine that trains other factors; its next steps."""
    engine = build(stage, "fp32", frozen=frozen, model_seed=1)
    train(engine, 100, 102)
    try:
        engine.load_checkpoint(directory)
    except ValueError as error:
        cases.release(engine)
        return {"refused": str(error)}
    before = engine.collect_merged()
    state = cases.gathered_state(engine)
    factors = [name for name in state["master"] if name.endswith(("lora_A", "lora_B"))]
    result = {
        "merged": fingerprint(before),
        "moments": sum(state[what][name].abs().sum().item() for what in ("exp_avg", "exp_avg_sq") for name in factors),
        "adam_steps": engine.shards.adam_steps()["lora"],
        "losses": train(engine, steps, steps + 6),
        "restarts": list(engine.restarts),
    }
    cases.release(engine)
    return result


def merged_in(directory: str, stage: int, **frozen) -> str:
    engine = build(stage, "fp32", frozen=frozen, model_seed=2)
    engine.load_checkpoint(directory)
    found = fingerprint(engine.collect_merged())
    cases.release(engine)
    return found


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [(1, {}, ONE_SIDED), (3, ONE_SIDED, {}), (1, ONE_SIDED, {**ONE_SIDED, "r": 6}), (3, {}, {"lora_alpha": 4})],
)
def test_another_chain_begins_at_a_restart(stage, before, after, tmp_path):
    ranks(2).run(saved_after, EVERY, stage, str(tmp_path), **before)
    merged = ranks(2).run(merged_in, str(tmp_path), stage, **before)[0]
    result = ranks(2).run(in_another_chain, EVERY, stage, str(tmp_path), **after)[0]
    assert result["merged"] == merged and result["moments"] == result["adam_steps"] == 0
    assert result["restarts"] == [4, 8] and result["losses"][-1] < result["losses"][0] + 0.1


RESIDUAL = {**ONE_SIDED, "residual_every": 4}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({}, ONE_SIDED, "trains was both, is B, which can change directly after a restart only"),
        ({}, {"r": 6}, "r was 4, is 6, which can change directly after a restart only"),
        (ONE_SIDED, {**ONE_SIDED, "lora_alpha": 4, "use_rslora": True}, "lora_alpha was 8, is 4 and use_rslora"),
        (RESIDUAL, ONE_SIDED, "residual_every was 4, is None, which can change at the end of a period only"),
        (RESIDUAL, {**RESIDUAL, "residual_every": 2}, "residual_every was 4, is 2, which"),
    ],
)
def test_another_chain_is_refused_within_a_cycle(before, after, words, tmp_path):
    ranks(2).run(saved_after, SAVED_AT, 1, str(tmp_path), **before)
    for result in ranks(2).run(in_another_chain, SAVED_AT, 1, str(tmp_path), **after):
        assert words in result["refused"], result
        assert result["refused"].endswith("; resume from step 4, or change it back")


def test_residual_updates_may_begin_within_a_cycle(tmp_path):
    ranks(2).run(saved_after, SAVED_AT, 1, str(tmp_path), **ONE_SIDED)
    result = ranks(2).run(in_another_chain, SAVED_AT, 1, str(tmp_path), **RESIDUAL)[0]
    assert result["restarts"] == [4, 8, 12]
