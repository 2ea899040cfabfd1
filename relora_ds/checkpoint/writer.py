"""Writes the checkpoints of one engine, in the background.

    save      copies what changes to the CPU (the stall that training sees) and hands it to a thread
    thread    writes this rank's files, waits for the others' word, and a leader makes it a checkpoint:
              manifest, one rename of the directory, `latest`, and then deletes what is not kept

The threads of the ranks talk over a process group of their own. Whatever fails, on whatever rank, leaves the
checkpoints before it as they are, and training goes on.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from relora_ds.checkpoint import files
from relora_ds.checkpoint.manifest import FROZEN, LATEST, TRAINED, File, Manifest, tag_of
from relora_ds.checkpoint.state import RANGES, Captured, capture
from relora_ds.checkpoint.store import remove
from relora_ds.zero.plain_model import own_generation_config

logger = logging.getLogger(__name__)

_LIBRARIES = ("relora_ds", "torch", "deepspeed", "transformers", "safetensors")


@dataclass(frozen=True)
class Written:
    """How a checkpoint went.

    Attributes:
        step: that it is of.
        bytes: of all its files; new_bytes: without those that an earlier checkpoint has too.
        stall_s, write_s: seconds that training waited, and that writing took in all.
        error: why there is none; None where there is.
    """

    step: int
    bytes: int
    new_bytes: int
    stall_s: float
    write_s: float
    error: str | None = None


class CheckpointWriter:
    """The checkpoints of an engine in `directory`, one after the other. Collective: every rank has one.

    Args:
        after: called by a leader when a checkpoint is complete, to delete what is not kept.
        continues: a checkpoint with the frozen weights that the engine was restored from.
    """

    def __init__(self, engine, directory: Path, after: Callable[[], None] = lambda: None,
                 continues: tuple[Path, Manifest] | None = None):
        self._engine, self._directory, self._after = engine, directory, after
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # a slow disk is no failure
        self.leads, self._peers = _sharing(directory)
        self._frozen = None  # (number of restarts, directory, files) of the newest checkpoint with frozen weights
        if continues is not None and _same_content(continues[1], engine):
            source, about = continues
            self._frozen = (len(engine.restarts), source, _frozen_files(about.files))
        if self.leads:
            for leftover in (*directory.glob(".step_*"), *directory.glob("*.tmp"), *directory.glob(".*_rank_*")):
                # The marks may be those of this start, which their ranks delete as well.
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        self._thread: threading.Thread | None = None
        self._done: list[Written] = []
        dist.barrier()

    def save(self, step: int, run: dict) -> None:
        """Begin to write the checkpoint of the state as it is now.

        Args:
            step: applied steps of the run; names the checkpoint.
            run: JSON values for the manifest.
        """
        started = time.perf_counter()
        self.wait()
        restarts = len(self._engine.restarts)
        known = self._frozen is not None and self._frozen[0] == restarts
        captured = capture(self._engine, self._peers, with_frozen=not known)
        stall = time.perf_counter() - started
        self._thread = threading.Thread(target=self._run, args=(step, run, captured, restarts, started, stall),
                                        name="checkpoint", daemon=True)  # a rank that fails does not wait for it
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_finished(self) -> list[Written]:
        """What has ended since the last call; the same on every rank sooner or later."""
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Wait, and leave."""
        self.wait()
        dist.destroy_process_group(self._group)

    # -- in the background ---------------------------------------------------------------------------------------

    def _run(self, step: int, run: dict, captured: Captured, restarts: int, started: float, stall: float) -> None:
        try:
            self._write(step, run, captured, restarts, started, stall)
        except Exception as error:  # a rank that is gone: the others find out in training
            self._frozen = None
            self._done.append(Written(step, 0, 0, stall, time.perf_counter() - started, f"{error}"))

    def _write(self, step: int, run: dict, captured: Captured, restarts: int, started: float, stall: float) -> None:
        target = self._directory / tag_of(step)
        temporary = self._directory / f".{target.name}"
        mine, failed = _attempt(lambda: self._write_files(temporary, captured))
        words = [None] * dist.get_world_size()
        dist.all_gather_object(words, (mine, failed, captured.contents()), group=self._group)
        failed = next((error for _, error, _ in words if error), None) or captured.gaps([what for *_, what in words])
        listed = {name: file for own, *_ in words for name, file in (own or {}).items()}
        new = sum(file.size for file in listed.values())
        if captured.frozen is None:
            listed |= self._frozen[2]
        if failed is None and self.leads:
            about = Manifest(step, run, captured.engine, captured.model | {"restarts": restarts}, listed, _versions())
            _, failed = _attempt(lambda: self._complete(temporary, target, about))
        dist.all_gather_object(words, failed, group=self._group)
        failed = next(filter(None, words), None)
        if failed is None:
            self._frozen = (restarts, target, _frozen_files(listed))
        else:
            self._frozen = None  # write them again, whatever has become of the files
            if self.leads:
                shutil.rmtree(temporary, ignore_errors=True)
        self._done.append(Written(step, sum(file.size for file in listed.values()), new, stall,
                                  time.perf_counter() - started, failed))
        if failed is None and self.leads and (error := _attempt(self._after)[1]):
            logger.warning("old checkpoints stay: %s", error)

    def _write_files(self, directory: Path, captured: Captured) -> dict[str, File]:
        """Write what this rank has; returns it with sizes and checksums."""
        directory.mkdir(parents=True, exist_ok=True)
        rank, written = dist.get_rank(), {}

        def add(name: str) -> None:
            path = directory / name
            files.sync(path)
            written[name] = File(path.stat().st_size, files.sha256(path), socket.gethostname())

        def save(kind: str, tensors: dict, metadata: dict[str, str]) -> None:
            if tensors:
                name = f"{kind}_{rank:05d}.safetensors"
                save_file(tensors, directory / name, metadata)
                add(name)

        save(TRAINED, captured.trained, {RANGES: json.dumps(captured.ranges)})
        if captured.frozen is not None:
            save(FROZEN, captured.frozen, {})
        elif self.leads:
            for name, file in self._frozen[2].items():
                if (self._frozen[1] / name).is_file() or file.host == socket.gethostname():  # else another host has it
                    files.link(self._frozen[1] / name, directory / name)
        module = self._engine.module
        if self.leads and hasattr(getattr(module, "config", None), "save_pretrained"):
            module.config.save_pretrained(directory)
            add("config.json")
            if own_generation_config(module):
                module.generation_config.save_pretrained(directory)
                add("generation_config.json")
        return written

    def _complete(self, temporary: Path, target: Path, about: Manifest) -> None:
        about.write(temporary)
        files.sync(temporary)
        if target.exists():  # of a run that went back and came here again
            remove(target)
        os.replace(temporary, target)
        files.sync(self._directory)
        files.write_text(self._directory / LATEST, target.name)


def _sharing(directory: Path) -> tuple[bool, list[int]]:
    """Whether this rank is the first that sees its directory, and which ranks see the same one. Collective."""
    directory.mkdir(parents=True, exist_ok=True)
    prefix = [f".{uuid.uuid4()}_rank_"]  # another start may have left its marks
    dist.broadcast_object_list(prefix, 0)
    mark = directory / f"{prefix[0]}{dist.get_rank()}"
    mark.touch()
    dist.barrier()
    peers = sorted(int(path.name.removeprefix(prefix[0])) for path in directory.glob(f"{prefix[0]}*"))
    dist.barrier()
    mark.unlink(missing_ok=True)  # the leader clears up what other starts left, and may come first
    return peers[0] == dist.get_rank(), peers


def _attempt(work: Callable) -> tuple[object, str | None]:
    """(result, None) or (None, what went wrong): the other ranks wait for word, whatever it is."""
    try:
        return work(), None
    except Exception as error:
        logger.debug("checkpoint", exc_info=True)
        return None, f"rank {dist.get_rank()} on {socket.gethostname()}: {type(error).__name__}: {error}"


def _same_content(about: Manifest, engine) -> bool:
    """Whether the frozen files of a checkpoint are what the engine would write now."""
    saved, now = about.model["frozen"], dataclasses.asdict(engine.frozen.storage)
    in_fp32 = [content["with_masters"] or content["dtype"] == "fp32" for content in (saved, now)]
    return about.model["restarts"] == len(engine.restarts) and (all(in_fp32) or saved == now)


def _frozen_files(listed: dict[str, File]) -> dict[str, File]:
    return {name: file for name, file in listed.items() if name.startswith(FROZEN)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            continue
    return found
