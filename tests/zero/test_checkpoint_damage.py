"""What lies beside DeepSpeed's own files: one rank that fails, or a damaged pointer or description, blocks nobody."""

import errno
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from relora_ds.zero import checkpoint_model
from tests.parity import cases
from tests.ranks import ranks
from tests.zero.test_nonfinite import everything


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_where_one_rank_fails(directory: str, rank: int, name: str) -> tuple[str, str]:
    """On a rank: save, and once more with a rank that cannot write."""
    engine, said = cases.build(1, precision="bf16"), ""
    engine.save_checkpoint(directory, "first")
    with mock.patch(name, full) if dist.get_rank() == rank else nullcontext():
        try:
            engine.save_checkpoint(directory, "first")
        except OSError as error:
            said = str(error)
    dist.barrier()  # each deletes what it had begun to write
    left = sorted(path.name for path in (Path(directory) / "first").glob("relora_*"))
    cases.release(engine)
    return said, left


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        (1, "relora_ds.zero.checkpoint_files.save_file"),
        (0, "relora_ds.zero.checkpoint_files.save_file"),
        (0, "relora_ds.zero.checkpoint_model.engine_state"),
    ],
)
def test_where_one_rank_cannot_write_all_of_them_hear_of_it(tmp_path, rank, name):
    for said, left in ranks(2).run(save_where_one_rank_fails, str(tmp_path), rank, name, timeout=120):
        assert said == f"save_checkpoint: rank {rank}: OSError: [Errno 28] No space left on device"
        assert left == [
            "relora_frozen_masters_00000.safetensors",
            "relora_frozen_masters_00001.safetensors",
            "relora_model.json",
        ]


def load_with(directory: str, damage) -> tuple:
    """On a rank: save twice, damage, load."""
    engine = cases.build(1, precision="bf16")
    for step, tag in enumerate(("older", "newer")):
        cases.train_step(engine, step)
        engine.save_checkpoint(directory, tag)
    saved = everything(engine)
    cases.train_step(engine, 2)
    dist.barrier()
    if dist.get_rank() == 0:
        damage(Path(directory))
    dist.barrier()
    path, _ = engine.load_checkpoint(directory)
    same = everything(engine) == saved
    cases.release(engine)
    return Path(path).parent.name, same


def one_bad_byte(directory: Path) -> None:
    (directory / "latest").write_bytes(b"new\xffr")


def leads_elsewhere(directory: Path) -> None:
    shutil.copytree(directory / "older", directory.parent / "elsewhere")
    (directory / "latest").write_text("../elsewhere")


def names_nothing(directory: Path) -> None:
    (directory / "latest").write_text("nothing")


def description(directory: Path) -> None:
    (directory / "newer" / checkpoint_model.DESCRIPTION).write_bytes(b"\xff{")


@pytest.mark.parametrize("damage", [one_bad_byte, leads_elsewhere, names_nothing, description])
def test_a_damaged_pointer_or_description_costs_a_warning(tmp_path, damage):
    assert ranks(2).run(load_with, str(tmp_path / "c"), damage, timeout=120) == [("newer", True)] * 2


def test_an_export_names_the_damaged_description(tmp_path):
    (tmp_path / checkpoint_model.DESCRIPTION).write_text("[]")
    with pytest.raises(ValueError, match="relora_model.json cannot be read .*; use another checkpoint"):
        checkpoint_model.read_description(tmp_path)
