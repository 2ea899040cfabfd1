"""What can happen to a run directory while a run trains. Called on every rank after each step."""

import resource
import shutil
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from relora_ds.checkpoint.store import directories
from relora_ds.training.trainer import Trainer

AT, HEALED = 15, 20  # steps; checkpoints after 12 and 18 have the same frozen weights
FOREIGN_SOURCE = "the run that was resumed is deleted"


def once(cause: Callable[[Path], object]) -> Callable[[Trainer, Path, ExitStack], None]:
    """Rank 0 does it, when nothing is being written."""

    def mishap(trainer: Trainer, run: Path, stack: ExitStack) -> None:
        if trainer.run.step == AT:
            trainer.checkpoints.writer.wait()
            dist.barrier()
            if dist.get_rank() == 0:
                cause(run)
            dist.barrier()

    return mishap


def archive(run: Path) -> None:
    directories(run)[-1].rename(run.with_name("archive"))


def archive_all(run: Path) -> None:
    for path in directories(run):
        path.rename(run.with_name(f"archive_{path.name}"))


def delete_source(run: Path) -> None:
    shutil.rmtree(run.with_name("source"))


def move(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).rename(run.with_name("moved"))


def overwrite(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(b"\xff{")


def truncate_frozen(run: Path) -> None:
    for path in directories(run)[-1].glob("frozen_*"):
        content = path.read_bytes()
        path.unlink()  # the other checkpoints of the cycle keep theirs
        path.write_bytes(content[:-9])


def rename_host(trainer: Trainer, run: Path, stack: ExitStack) -> None:
    if trainer.run.step == AT:
        stack.enter_context(mock.patch.object(socket, "gethostname", lambda: "another-pod"))


def fill_disk(trainer: Trainer, run: Path, stack: ExitStack) -> None:
    """No file can grow past 4 KiB for some steps."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trainer.run.step == AT:
        trainer.checkpoints.writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
    if trainer.run.step == HEALED:
        trainer.checkpoints.writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))


MISHAPS: dict[str, Callable[[Trainer, Path, ExitStack], None]] = {
    "the newest checkpoint is moved away": once(archive),
    "all checkpoints are moved away": once(archive_all),
    "the newest frozen weights are cut short": once(truncate_frozen),
    FOREIGN_SOURCE: once(delete_source),
    "the host gets another name": rename_host,
    "the disk is full for five steps": fill_disk,
    "tensorboard is moved away": once(move("tensorboard")),
    "metrics.jsonl is moved away": once(move("metrics.jsonl")),
    "the tokenizer is moved away": once(move("checkpoints/tokenizer")),
    "checkpoints is moved away": once(move("checkpoints")),
    "the run is moved away": once(lambda run: run.rename(run.with_name("moved"))),
    "the lock is deleted": once(lambda run: (run / "lock").unlink()),
    "latest is damaged": once(overwrite("checkpoints/latest")),
    "status.json is damaged": once(overwrite("status.json")),
    "recipe.yaml is moved away": once(move("recipe.yaml")),
}
