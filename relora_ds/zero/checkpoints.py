"""Checkpoints of an engine: how its loop saves and loads them, in the format of `relora_ds.checkpoint`.

A run's trainer has a writer for one directory (`writer_of`). A loop of one's own and transformers' Trainer call
DeepSpeed's `save_checkpoint` and `load_checkpoint`, with any directory and name (`EngineCheckpoints`).
"""

import dataclasses
import logging
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from relora_ds.checkpoint import client_state as client
from relora_ds.checkpoint.earlier import refusal
from relora_ds.checkpoint.find import Found, find_tag
from relora_ds.checkpoint.manifest import Manifest
from relora_ds.checkpoint.sharing import Sharing
from relora_ds.checkpoint.tensors import SavedTensors
from relora_ds.checkpoint.writer import CheckpointWriter
from relora_ds.lowrank.words import for_everyone
from relora_ds.zero.capture import EngineSource, cycle_of
from relora_ds.zero.restore import problems, restore
from relora_ds.zero.start import host_group
from relora_ds.zero.together import together

logger = logging.getLogger(__name__)

_TAG = re.compile(r"[^./\\\s][^/\\\n]*")  # a directory beside `latest`, and not a hidden one


def writer_of(
    engine,
    directory: Path,
    after: Callable[[], None] = lambda: None,
    continues: tuple[Path, Manifest] | None = None,
    sharing: Sharing | None = None,
    keeps_replaced: bool = True,
) -> CheckpointWriter:
    """Make the writer of an engine's checkpoints in `directory`. Collective.

    Args:
        after, keeps_replaced: see `CheckpointWriter`.
        continues: the checkpoint that the engine was restored from.
        sharing: who sees `directory`, where that is known.
    """
    writer = CheckpointWriter(EngineSource(engine), host_group(), after, keeps_replaced)
    writer.move_to(directory, sharing)
    writer.share(_shared(continues, engine))
    return writer


def _shared(continues: tuple[Path, Manifest] | None, engine) -> tuple[Path, Manifest] | None:
    """Return the checkpoint if its frozen files are what the engine would write now."""
    if continues is None:
        return None
    about = continues[1].model
    saved, now = about["frozen"], dataclasses.asdict(engine.frozen.storage)
    in_fp32 = [content["with_masters"] or content["dtype"] == "fp32" for content in (saved, now)]
    is_same = about["restarts"] == cycle_of(engine) and (all(in_fp32) or saved == now)
    return continues if is_same else None


class EngineCheckpoints:
    """What an engine's `save_checkpoint` and `load_checkpoint` do. Collective: all ranks make every call."""

    def __init__(self, engine) -> None:
        self._engine = engine
        self._writer: CheckpointWriter | None = None
        self._directory: Path | None = None  # that it writes to
        self._loaded: tuple[Path, Manifest] | None = None

    def save(self, save_dir, tag, client_state: dict, save_latest: bool, background: bool) -> None:
        """Write a checkpoint. Arguments and errors: see `ReLoRAEngine.save_checkpoint`."""
        self.wait()
        tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
        saved: list = []

        def check() -> None:
            if not save_dir:
                raise ValueError(f"save_dir: {save_dir!r} is not a directory; name one")
            if not _TAG.fullmatch(tag):
                raise ValueError(f"tag: {tag!r} is not the name of a directory; put a path into save_dir")
            saved.extend(client.encode(client_state))

        together("save_checkpoint", check, ValueError)
        _require_one(tag)
        directory = Path(save_dir).absolute()
        together("save_checkpoint", lambda: directory.mkdir(parents=True, exist_ok=True))
        if self._writer is None:
            self._writer = writer_of(self._engine, directory, continues=self._loaded, keeps_replaced=False)
        elif directory != self._directory:
            self._writer.move_to(directory)
        self._directory = directory
        values, tensors = saved
        self._writer.save(self._engine.t, values, tag, tensors, save_latest)
        if not background:
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. OSError, on every rank, where it could not be."""
        if self._writer is None:
            return
        self._writer.wait()
        if failed := [done.error for done in self._writer.take_finished() if done.error]:
            raise OSError(f"save_checkpoint: {failed[0]}")

    def load(self, load_dir, tag, optimizer: bool, schedule: bool) -> tuple[str | None, dict]:
        """Restore a checkpoint; return its path and client_state.

        Args:
            optimizer: with Adam's moments, its steps and the loss scale.
            schedule: with the steps and the restarts so far.

        Raises:
            ValueError: see `ReLoRAEngine.load_checkpoint`.
        """
        self.wait()
        if self._engine.num_accumulated:
            raise ValueError(
                "load_checkpoint: gradients of the weights as they are now are being accumulated, and the next step() "
                "would apply them; call it after that step(), or load into a new engine"
            )
        load_dir, tag = Path(load_dir), None if tag is None else str(tag)
        try:
            found = _find(load_dir, tag)
            if found is None:
                logger.warning("load_checkpoint: there is no checkpoint in %s; nothing is loaded", load_dir)
                return None, {}
            if reasons := problems(found.manifest, self._engine, optimizer=optimizer):
                raise ValueError(f"{found.directory} does not fit: {for_everyone('; '.join(reasons))}")
            restore(self._engine, found.directory, found.manifest, optimizer=optimizer, schedule=schedule)
        except ValueError as error:
            raise ValueError(f"load_checkpoint: {error}") from error
        self._loaded = _shared((found.directory, found.manifest), self._engine)
        if self._writer is not None:
            self._writer.share(self._loaded)
        return str(found.directory), _client_state(found)

    def close(self) -> None:
        """Wait, and leave the writer's process group; a checkpoint that could not be written costs a warning."""
        if self._writer is not None and dist.is_initialized() and not sys.is_finalizing():
            writer, self._writer = self._writer, None
            writer.close()
            for done in writer.take_finished():
                if done.error is not None:
                    logger.warning("save_checkpoint: %s", done.error)


def _require_one(tag: str) -> None:
    tags: list = [None] * dist.get_world_size()
    dist.all_gather_object(tags, tag)
    if len(set(tags)) > 1:
        raise ValueError(f"save_checkpoint: tag is {', '.join(tags)} on different ranks; give all of them the same")


def _find(load_dir: Path, tag: str | None) -> Found | None:
    """Return the checkpoint to load. Errors: ValueError on every rank."""
    reason: list = [None]

    def look() -> None:
        if dist.get_rank() == 0:
            reason[0] = refusal(load_dir / tag if tag else load_dir)

    together(f"{load_dir} cannot be read now", look, ValueError)
    dist.broadcast_object_list(reason, 0)
    if reason[0] is not None:
        raise ValueError(reason[0])
    found = find_tag(load_dir, tag)
    if found is not None and dist.get_rank() == 0:
        for line in found.passed_over:
            logger.warning("load_checkpoint: %s", line)
    return found


def _client_state(found: Found) -> dict:
    """Return what rank 0 reads; its tensors are in rank 0's file."""
    state: list = [None]

    def read() -> None:
        if dist.get_rank() == 0:
            with ExitStack() as stack:
                saved = SavedTensors(found.directory, found.manifest, stack)
                state[0] = client.decode(found.manifest.run, saved.read)

    together("load_checkpoint", read, ValueError)
    dist.broadcast_object_list(state, 0)
    return state[0]
