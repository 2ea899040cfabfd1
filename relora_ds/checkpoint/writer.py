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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from relora_ds.checkpoint import files
from relora_ds.checkpoint.manifest import FROZEN, TRAINED, File, Manifest
from relora_ds.checkpoint.state import RANGES, Captured, capture
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
        self._group = dist.new_group(backend="gloo")
        self.leads, self._peers = _sharing(directory)
        self._frozen = None  # (number of restarts, directory, files) of the newest checkpoint with frozen weights
        if continues is not None and _same_content(continues[1], engine):
            source, about = continues
            self._frozen = (len(engine.restarts), source, _frozen_files(about.files))
        if self.leads:
            for leftover in (*directory.glob(".step_*"), *directory.glob("*.tmp")):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
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
                                        name="checkpoint")
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
        target = self._directory / tag_of(step)
        temporary = self._directory / f".{target.name}"
        mine, failed = _attempt(lambda: self._write_files(temporary, captured))
        words = [None] * dist.get_world_size()
        dist.all_gather_object(words, (mine, failed), group=self._group)
        failed = next((error for _, error in words if error), None)
        listed = {name: file for own, _ in words for name, file in (own or {}).items()}
        if captured.frozen is None:
            listed |= self._frozen[2]
        new = sum(file.size for own, _ in words for file in (own or {}).values())
        if failed is None and self.leads:
            about = Manifest(step, run, captured.engine, captured.model | {"restarts": restarts}, listed, _versions())
            _, failed = _attempt(lambda: self._complete(temporary, target, about))
        dist.all_gather_object(words, failed, group=self._group)
        failed = next(filter(None, words), None)
        if failed is None:
            self._frozen = (restarts, target, _frozen_files(listed))
        elif self.leads:
            shutil.rmtree(temporary, ignore_errors=True)
        self._done.append(Written(step, sum(file.size for file in listed.values()), new, stall,
                                  time.perf_counter() - started, failed))
        if failed is None and self.leads:
            self._after()

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
            for name in self._frozen[2]:
                if (self._frozen[1] / name).is_file():  # else it is on another host
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
            shutil.rmtree(target)
        os.replace(temporary, target)
        files.sync(self._directory)
        files.write_text(self._directory / LATEST, target.name)


LATEST = "latest"


def tag_of(step: int) -> str:
    """The directory name of the checkpoint after `step` applied steps."""
    return f"step_{step:08d}"


def _sharing(directory: Path) -> tuple[bool, list[int]]:
    """Whether this rank is the first that sees its directory, and which ranks see the same one. Collective."""
    directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    mark = directory / f".rank_{dist.get_rank():05d}"
    mark.touch()
    dist.barrier()
    peers = sorted(int(path.name.removeprefix(".rank_")) for path in directory.glob(".rank_*"))
    dist.barrier()
    mark.unlink()
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
