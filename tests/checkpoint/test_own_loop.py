"""`engine.save_checkpoint` and `load_checkpoint` in a loop of one's own: moves, client_state, names, the background."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from relora_ds.checkpoint import client_state, manifest, rank_files, store, writer
from relora_ds.zero import checkpoints
from tests.checkpoint.weights import weights_in
from tests.parity import cases
from tests.ranks import ranks
from tests.zero.test_checkpoint import END, SAVED_AT, build, train
from tests.zero.test_nonfinite import everything

INT8 = {"frozen_dtype": "int8"}
SIZES = dict(hidden_size=32, intermediate_size=48)  # every format can store them


def unmoved(directory: str) -> list[float]:
    """On a rank: train through restarts after 4 and 8, save after 6; return the losses that follow."""
    engine = build(1, "fp32", **SIZES)
    train(engine, 0, SAVED_AT)
    engine.save_checkpoint(directory)
    losses = train(engine, SAVED_AT, END)
    cases.release(engine)
    return losses


def moved(directory: str, stage: int, precision: str, frozen: dict | None) -> tuple[list[float], list[int]]:
    """On a rank: load, and train to the end; return losses and restarts."""
    engine = build(stage, precision, frozen=frozen, model_seed=1, **SIZES)
    engine.load_checkpoint(directory)
    found = train(engine, SAVED_AT, END), list(engine.restarts)
    cases.release(engine)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("own") / "checkpoints"
    return directory, ranks(2).run(unmoved, str(directory))[0]


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    ("stage", "world_size", "precision", "frozen", "tolerance"),
    [
        (3, 1, "fp32", None, 1e-4),
        (3, 3, "fp32", None, 1e-4),
        (0, 3, "fp32", INT8, 0.02),
        (2, 1, "bf16", None, 0.02),
    ],
)
def test_it_resumes_on_other_ranks_stages_precisions_and_formats(
    saved, stage, world_size, precision, frozen, tolerance
):
    directory, expected = saved
    for losses, restarts in ranks(world_size).run(moved, str(directory), stage, precision, frozen):
        assert losses == pytest.approx(expected, rel=tolerance) and restarts == [4, 8]


def states() -> dict:
    return {
        "epoch": 3,
        "best": 0.25,
        "name": None,
        "rng": torch.get_rng_state(),
        "python": random.Random(7).getstate(),
        "seen": {1: [True, (2, 3.5)], "$a": "b"},
        "nested": {"loader": {"order": torch.arange(5, dtype=torch.int16)}},
    }


def save_with_state(directory: str) -> tuple:
    """On a rank: the state of rank 0 comes back on every rank; what cannot be saved is refused on every rank."""
    engine, said = build(1, "fp32"), []
    mine = states() | {"epoch": 3 + dist.get_rank()}
    engine.save_checkpoint(directory, "t", client_state=mine)
    path, loaded = engine.load_checkpoint(directory, "t")
    equal = torch.equal(loaded.pop("rng"), mine.pop("rng"))
    order = loaded["nested"]["loader"].pop("order")
    mine["nested"]["loader"].pop("order")
    own = dist.get_rank() == 1
    for bad in ({"x": {1, 2}} if own else {}, {"numpy": torch.ones(2).numpy()}, ["no", "dict"]):
        try:
            engine.save_checkpoint(directory, "u", client_state=bad)
        except ValueError as error:
            said.append(str(error))
    cases.release(engine)
    return path, equal, order.tolist(), loaded == mine | {"epoch": 3}, said


def test_client_state_comes_back_as_it_was_given(tmp_path):
    for path, equal, order, same, said in ranks(2).run(save_with_state, str(tmp_path)):
        assert path == str(tmp_path / "t") and equal and same and order == [0, 1, 2, 3, 4]
        assert said == [
            "save_checkpoint: rank 1: ValueError: client_state['x']: set cannot be saved; give JSON values, tuples, "
            "dicts and tensors, such as those of its state_dict() or item()",
            "save_checkpoint: rank 0: ValueError: client_state['numpy']: ndarray cannot be saved; give "
            "torch.from_numpy(it)",
            "save_checkpoint: rank 0: ValueError: client_state: a list instead of a dict",
        ]
    assert [path.name for path in store.tagged(tmp_path)] == ["t"]
    json.loads((tmp_path / "t" / "manifest.json").read_text())


def test_encoding_is_undone_by_decoding():
    values, tensors = client_state.encode(states())
    found = client_state.decode(json.loads(json.dumps(values)), tensors.__getitem__)
    assert found["python"] == random.Random(7).getstate() and found["seen"] == states()["seen"]


def save_under_names(directory: str) -> tuple:
    """On a rank: names that are no directory's, one that ranks do not agree on, one that is used again."""
    engine, said = build(1, "bf16"), []
    for tag in ("a/b", "..", ".hidden", "", f"rank{dist.get_rank()}"):
        try:
            engine.save_checkpoint(directory, tag)
        except ValueError as error:
            said.append(str(error))
    train(engine, 0, 1)
    engine.save_checkpoint(directory, "last")
    train(engine, 1, 2)
    engine.save_checkpoint(directory, "last")
    then = everything(engine)
    train(engine, 2, 3)
    engine.save_checkpoint(directory, "other", save_latest=False)
    path, _ = engine.load_checkpoint(directory)
    same = everything(engine) == then
    dist.barrier()
    if dist.get_rank() == 0:
        Path(directory, "last", "notes.txt").write_text("mine")
    dist.barrier()
    try:
        engine.save_checkpoint(directory, "last")
    except OSError as error:
        said.append(str(error))
    cases.release(engine)
    return said, Path(path).name, same


def test_a_name_that_is_used_again_replaces_the_checkpoint_and_nothing_else(tmp_path):
    for said, name, same in ranks(2).run(save_under_names, str(tmp_path)):
        assert len(said) == 6 and all("is not the name of a directory" in message for message in said[:4])
        assert "tag is rank0, rank1 on different ranks" in said[4] and "holds notes.txt" in said[5]
        assert (name, same) == ("last", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "latest", "other"]
    assert store.verify(tmp_path / "last") == [] and manifest.read(tmp_path / "last").step == 2


def save_into(directories: list[str]) -> list[int]:
    """On a rank: one save into each directory, a restart before the last one; return the new bytes of each."""
    engine, seen, usual = build(1, "bf16"), [], writer.CheckpointWriter.take_finished

    def watched(self):
        done = usual(self)
        seen.extend(one.bytes - one.new_bytes for one in done)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer.CheckpointWriter, "take_finished", watched)
        for step, directory in enumerate(directories):
            train(engine, step, step + 1)
            engine.save_checkpoint(directory)
        train(engine, len(directories), 5)
        assert engine.restarts == [4]
        engine.save_checkpoint(directories[0], "after")
        engine.load_checkpoint(directories[0], "global_step1")
        engine.save_checkpoint(directories[0], "again")
    cases.release(engine)
    return seen


def test_what_is_frozen_is_shared_between_directories_until_a_restart(tmp_path):
    """As transformers' Trainer has them: OUT/checkpoint-1/global_step1, OUT/checkpoint-2/global_step2."""
    directories = [str(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    for first, second, after, again in ranks(2).run(save_into, directories):
        assert first == after == 0 and second == again > 0
    shutil.rmtree(directories[0])
    assert store.verify(Path(directories[1]) / "global_step2") == []


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_in_the_background(directory: str) -> tuple[bool, bool, str]:
    engine = build(1, "bf16")
    engine.save_checkpoint(directory, "good", background=True)
    saved = everything(engine)
    train(engine, 0, 5)  # past a restart, while it is written
    engine.wait_for_checkpoint()
    said = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_files, "save_file", full)
        engine.save_checkpoint(directory, "bad", background=True)
        train(engine, 5, 6)
        try:
            engine.wait_for_checkpoint()
        except OSError as error:
            said = str(error)
    path, _ = engine.load_checkpoint(directory)
    same = everything(engine) == saved
    engine.save_checkpoint(directory, "last", background=True)
    cases.release(engine)  # waits
    return Path(path).name == "good", same, said


def test_in_the_background_it_is_of_the_moment_of_the_call(tmp_path):
    for is_good, same, said in ranks(2).run(save_in_the_background, str(tmp_path)):
        assert is_good and same and said.startswith("save_checkpoint: rank ") and "No space left" in said
    assert [path.name for path in store.tagged(tmp_path)] == ["good", "last"]


def load_parts(directory: str) -> dict:
    """On a rank: weights alone, without moments, without the schedule."""
    engine, found = build(1, "fp32"), {}
    train(engine, 0, SAVED_AT)
    saved = everything(engine)
    engine.save_checkpoint(directory)
    cases.release(engine)
    for name, how in {
        "weights": {"load_module_only": True},
        "no moments": {"load_optimizer_states": False},
        "no schedule": {"load_lr_scheduler_states": False},
    }.items():
        engine = build(1, "fp32", model_seed=1)
        engine.load_checkpoint(directory, **how)
        now = everything(engine)
        found[name] = {what for what in now if now[what] != saved[what]}
        cases.release(engine)
    return found


def test_parts_that_deepspeeds_arguments_leave_out_are_left_out(tmp_path):
    for found in ranks(2).run(load_parts, str(tmp_path)):
        moments, schedule = {"exp_avg", "exp_avg_sq", "adam steps"}, {"t", "restarts", "lr"}
        assert found == {"weights": moments | schedule, "no moments": moments, "no schedule": schedule}


def weights_alone(directory: str) -> bool:
    """On a rank: take the weights of a checkpoint after a restart, train through one, save; is everything saved?"""
    engine = build(1, "bf16")
    train(engine, 0, SAVED_AT)
    engine.save_checkpoint(directory, "first")
    cases.release(engine)
    engine = build(1, "bf16", model_seed=1)
    engine.load_checkpoint(directory, "first", load_module_only=True)
    train(engine, 0, SAVED_AT)
    assert engine.restarts == [4]  # as many as in the checkpoint, and its frozen weights are not these
    engine.save_checkpoint(directory, "second")
    merged, saved = engine.collect_merged(), weights_in(Path(directory, "second"))
    cases.release(engine)
    return all(torch.equal(merged[name], saved[name]) for name in merged)


def test_frozen_weights_of_another_history_are_not_shared(tmp_path):
    assert ranks(2).run(weights_alone, str(tmp_path)) == [True, True]


def load_between_micro_steps(directory: str) -> tuple[str, bool]:
    """On a rank: load while gradients are being accumulated; return what is said, and whether nothing changed."""
    engine, said = build(1, "fp32", accumulation=2), ""
    engine.save_checkpoint(directory)
    train(engine, 0, 1)
    before, tokens = everything(engine), cases.batch(1, 1)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    try:
        engine.load_checkpoint(directory)
    except ValueError as error:
        said = str(error)
    same = everything(engine) == before
    cases.release(engine)
    return said, same


def test_gradients_of_other_weights_are_not_taken_into_a_loaded_state(tmp_path):
    for said, same in ranks(2).run(load_between_micro_steps, str(tmp_path)):
        assert said.startswith("load_checkpoint: gradients of the weights as they are now") and same


def fail_before_the_release(directory: str) -> list[str]:
    """On a rank: a checkpoint in the background fails, and nobody asks for it; return the warnings."""
    engine, said = build(1, "bf16"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_files, "save_file", full)
        patch.setattr(checkpoints.logger, "warning", lambda text, *values: said.append(text % values))
        engine.save_checkpoint(directory, "bad", background=True)
        cases.release(engine)
    return said


def test_a_failure_that_nobody_waited_for_is_told_at_the_release(tmp_path):
    for said in ranks(2).run(fail_before_the_release, str(tmp_path)):
        assert len(said) == 1 and "No space left" in said[0]
