"""Write the checkpoints of one engine, in the background.

    save      links what an earlier checkpoint has, copies what changes to the CPU (the stall that training sees) and
              hands it to a thread
    thread    writes this rank's files, waits for the others' word, and a leader makes it a checkpoint, if all its files
              are there: manifest, one rename of the directory, `latest`, and then deletes what is not kept

The threads of the ranks talk over a process group of their own. Whatever fails, on whatever rank, leaves the
checkpoints before it as they are, and training goes on.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from relora_ds.checkpoint.contents import RANGES, Captured, Source
from relora_ds.checkpoint.manifest import FROZEN, LATEST, TRAINED, File, Manifest, tag_of
from relora_ds.checkpoint.sharing import Sharing, find_peers
from relora_ds.checkpoint.store import LATE_S, delete, put_aside
from relora_ds.utils import files
from relora_ds.utils.versions import installed_versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """How a checkpoint went.

    Attributes:
        step: the training step that it captures.
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


@dataclass(frozen=True)
class _Frozen:
    """The files of frozen weights that checkpoints of the same cycle share.

    Attributes:
        restarts: of the engine, when they were written.
        directory: the checkpoint that has them.
        files: as in its manifest.
        marks: of those that are on this leader's disk: what tells that a file is still the one that was verified.
    """

    restarts: int
    directory: Path
    files: dict[str, File]
    marks: dict[str, tuple[int, ...]]


class CheckpointWriter:
    """The checkpoints of an engine in `directory`, one after the other. Collective: every rank has one.

    Args:
        source: the engine, as `zero.checkpoints.writer_of` gives it.
        group: of all ranks, for objects on the host; the writer's own.
        after: called by a leader when a checkpoint is complete, to delete what is not kept.
        continues: a checkpoint with the frozen weights that the engine has now.
        sharing: who sees `directory`, where that is known.
    """

    def __init__(
        self,
        source: Source,
        directory: Path,
        group: dist.ProcessGroup,
        after: Callable[[], None] = lambda: None,
        continues: tuple[Path, Manifest] | None = None,
        sharing: Sharing | None = None,
    ):
        self._source, self._directory, self._group, self._after = source, directory, group, after
        self._sharing = sharing or find_peers(directory)
        self._frozen: _Frozen | None = None  # of the newest checkpoint
        if continues is not None:
            self._remember(continues[0], continues[1].files, source.cycle)
        if self._sharing.leads:
            for leftover in (
                *directory.glob(".step_*"),
                *directory.glob(f"{LATEST}.*.tmp"),
                *directory.glob(".*_rank_*"),
            ):
                delete(leftover)  # marks may be those of this start, which their ranks delete as well
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
        restarts = self._source.cycle
        temporary = self._directory / f".{tag_of(step)}"
        is_linked = self._link(temporary, restarts)
        captured = self._source.capture(self._sharing.peers, not is_linked)
        stall = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._run, args=(step, run, captured, restarts, started, stall), name="checkpoint", daemon=True
        )  # a rank that fails does not wait for it
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
        words = self._words((mine, failed, captured.contents()))
        failed = next((error for _, error, _ in words if error), None) or captured.gaps([what for *_, what in words])
        listed = {name: file for own, *_ in words for name, file in (own or {}).items()}
        new = sum(file.size for file in listed.values())
        if captured.frozen is None:
            listed |= self._frozen.files
        failed = failed or self._lacks(temporary, listed)
        if failed is None and self._sharing.leads:
            about = Manifest(
                step, run, captured.engine, captured.model | {"restarts": restarts}, listed, installed_versions()
            )
            _, failed = _attempt(lambda: self._complete(temporary, target, about))
        failed = next(filter(None, self._words(failed)), None)
        if failed is None:
            self._remember(target, listed, restarts)
        else:
            self._frozen = None  # write them again, whatever has become of the files
            if self._sharing.leads:
                _attempt(lambda: delete(temporary))
        self._done.append(
            Written(step, sum(file.size for file in listed.values()), new, stall, time.perf_counter() - started, failed)
        )
        if failed is None and self._sharing.leads and (error := _attempt(self._after)[1]):
            logger.warning("old checkpoints stay: %s", error)

    def _words(self, mine: object) -> list:
        """Gather a value from every rank. Collective among the threads that write, or between two saves."""
        words = [None] * dist.get_world_size()
        dist.all_gather_object(words, mine, group=self._group)
        return words

    def _remember(self, directory: Path, listed: dict[str, File], restarts: int) -> None:
        """Have the next checkpoint share the frozen weights of this one."""
        listed = {name: file for name, file in listed.items() if name.startswith(FROZEN)}
        marks = {}
        for name, file in listed.items() if self._sharing.leads else ():
            with contextlib.suppress(OSError):  # it is on another host's disk, or gone: that is looked into later
                mark = _mark(directory / name)
                if mark[0] == file.size:
                    marks[name] = mark
        self._frozen = _Frozen(restarts, directory, listed, marks)

    def _link(self, temporary: Path, restarts: int) -> bool:
        """Link the files of frozen weights that an earlier checkpoint has, if they are all still there. Collective.

        What cannot be linked (its checkpoint was moved, deleted or changed, or is on another file system) is written
        again.
        """

        def link() -> list[str]:
            if not self._sharing.leads:
                return []
            delete(temporary)
            if not shares:
                return []
            temporary.mkdir()
            for name, mark in self._frozen.marks.items():
                os.link(self._frozen.directory / name, temporary / name)
                if _mark(temporary / name) != mark:
                    raise OSError(f"{self._frozen.directory / name} was changed")
            return list(self._frozen.marks)

        shares = self._frozen is not None and self._frozen.restarts == restarts
        words = self._words(_attempt(link))
        there = {name for names, _ in words for name in names or ()}
        if shares and there == self._frozen.files.keys() and not any(error for _, error in words):
            return True
        if self._sharing.leads:
            _attempt(lambda: delete(temporary))  # or the files would be written through the links
        self._words(None)
        return False

    def _write_files(self, directory: Path, captured: Captured) -> dict[str, File]:
        """Write what this rank has; returns it with sizes and checksums."""
        # Not a shared run directory itself: where that was moved away, another run may begin.
        directory.parent.mkdir(parents=not self._sharing.is_shared, exist_ok=True)
        directory.mkdir(exist_ok=True)
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
        if self._sharing.leads:
            for name in self._source.write_config(directory):
                add(name)
        return written

    def _lacks(self, directory: Path, listed: dict[str, File]) -> str | None:
        """Which of the listed files no disk has, with its size; None where everything is there. Collective."""

        def look() -> list[str]:
            deadline = time.monotonic() + LATE_S
            return [
                name
                for name, file in listed.items()
                if self._sharing.leads and self._sees(directory / name, file, deadline)
            ]

        words = self._words(_attempt(look))
        missing = sorted(listed.keys() - {name for names, _ in words for name in names or ()})
        return next((error for _, error in words if error), None) or (
            f"{directory / missing[0]} is not there, or has another size than what was written" if missing else None
        )

    def _sees(self, path: Path, file: File, deadline: float) -> bool:
        """Return True for a file that is there with its size; what another host has written may be seen late."""
        while True:
            try:
                if _mark(path)[0] == file.size:
                    return True
            except FileNotFoundError:
                if not self._sharing.is_here(path.name):
                    return False
            if file.host == socket.gethostname() or time.monotonic() > deadline:
                return False
            time.sleep(0.2)

    def _complete(self, temporary: Path, target: Path, about: Manifest) -> None:
        about.write(temporary)
        files.sync(temporary)
        if target.exists():  # of a run that went back and came here again, on a disk of this host's own
            put_aside(target)
        os.replace(temporary, target)
        files.sync(self._directory)
        if error := _attempt(lambda: files.write_text(self._directory / LATEST, target.name))[1]:
            logger.warning("%s was not written, and nothing needs it: %s", LATEST, error)


def _mark(path: Path) -> tuple[int, ...]:
    """Size, time of change and inode of a file; it is opened, because a network disk may answer stat() from memory."""
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns, about.st_ino


def _attempt(work: Callable) -> tuple[object, str | None]:
    """(result, None) or (None, what went wrong): the other ranks wait for word, whatever it is."""
    try:
        return work(), None
    except Exception as error:
        logger.debug("checkpoint", exc_info=True)
        return None, f"rank {dist.get_rank()} on {socket.gethostname()}: {type(error).__name__}: {error}"
