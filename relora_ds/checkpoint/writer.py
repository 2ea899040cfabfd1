"""Write the checkpoints of one engine, in the background.

    save      links what an earlier checkpoint has, copies what changes to the CPU (the stall that training sees) and
              hands it to a thread
    thread    writes this rank's files, waits until the others have theirs, and a leader makes it a checkpoint, if all
              its files are there: manifest, one rename of the directory, `latest`; then it deletes what is not kept

The threads of the ranks talk over a process group of their own. Whatever fails, on whatever rank, leaves the
checkpoints before it as they are, and training continues.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from relora_ds.checkpoint.contents import Source
from relora_ds.checkpoint.job import Job, Written
from relora_ds.checkpoint.links import FrozenFiles, mark, remember
from relora_ds.checkpoint.manifest import LATEST, File, Manifest, tag_of
from relora_ds.checkpoint.rank_files import write_files
from relora_ds.checkpoint.removal import delete, delete_leftovers, make_way
from relora_ds.checkpoint.sharing import Sharing, find_peers
from relora_ds.checkpoint.store import LATE_S
from relora_ds.utils import files
from relora_ds.utils.versions import installed_versions

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointWriter:
    """The checkpoints of an engine, one after the other. Collective: every rank has one.

    Args:
        source: the engine, as `zero.checkpoints.writer_of` gives it.
        group: of all ranks, for objects on the host; the writer's own.
        after: called by a leader when a checkpoint is complete, to delete what is not kept.
        keeps_replaced: a checkpoint in whose place another one comes is moved to `replaced/`, not deleted.
    """

    def __init__(
        self,
        source: Source,
        group: dist.ProcessGroup,
        after: Callable[[], None] = lambda: None,
        keeps_replaced: bool = False,
    ):
        self._source, self._group, self._after, self._keeps_replaced = source, group, after, keeps_replaced
        self._directory, self._sharing = Path(), Sharing(False, [], False)
        self._frozen: FrozenFiles | None = None  # of the newest checkpoint
        self._thread: threading.Thread | None = None
        self._done: list[Written] = []

    def move_to(self, directory: Path, sharing: Sharing | None = None) -> None:
        """Write the next checkpoints into `directory`. Collective. sharing: who sees it, where that is known."""
        self.wait()
        self._directory, self._sharing = directory, sharing or find_peers(directory)
        if self._sharing.leads:
            delete_leftovers(directory)
        dist.barrier(group=self._group)

    def share(self, continues: tuple[Path, Manifest] | None) -> None:
        """Have the next checkpoint share the frozen files of one that has the weights which the engine has now."""
        self.wait()
        self._frozen = continues and remember(continues[0], continues[1].files, self._source.cycle, self._sharing.leads)

    def save(
        self, step: int, run: dict, tag: str | None = None, tensors: dict[str, Tensor] | None = None, is_latest=True
    ) -> None:
        """Begin to write the checkpoint of the state as it is now.

        Args:
            step: applied steps of the run.
            run: JSON values for the manifest.
            tag: names the checkpoint; default: the step does.
            tensors: further ones that rank 0 writes, 1-D or more, on the CPU.
            is_latest: whether `latest` is to name it.
        """
        started = time.perf_counter()
        self.wait()
        cycle, target = self._source.cycle, self._directory / (tag or tag_of(step))
        job = Job(target, step, run, is_latest, None, None, cycle, started, 0.0)
        is_linked = self._link(job.temporary, cycle)
        captured, error = _attempt(lambda: self._source.capture(self._sharing.peers, not is_linked))
        if captured is not None and tensors and dist.get_rank() == 0:
            captured.trained.update(tensors)
        job = Job(target, step, run, is_latest, captured, error, cycle, started, time.perf_counter() - started)
        # A daemon: a rank that fails does not wait for it.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_finished(self) -> list[Written]:
        """Return what has ended since the last call; the same on every rank sooner or later."""
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Wait, and leave."""
        self.wait()
        dist.destroy_process_group(self._group)

    # -- in the background ---------------------------------------------------------------------------------------

    def _run(self, job: Job) -> None:
        try:
            self._write(job)
        except Exception as error:  # a rank that is gone: the others find out in training
            self._frozen = None
            self._done.append(job.done(0, 0, f"{error}"))

    def _write(self, job: Job) -> None:
        captured, mine, failed = job.captured, None, job.error
        if captured is not None:
            mine, failed = _attempt(lambda: write_files(job.temporary, captured, self._source, self._sharing))
        words = self._words((mine, failed, captured and captured.contents()))
        failed = next((error for _, error, _ in words if error), None)
        if failed is None and captured is not None:
            failed = captured.gaps([what for *_, what in words])
        listed = {name: file for own, *_ in words for name, file in (own or {}).items()}
        new = sum(file.size for file in listed.values())
        if captured is not None and captured.frozen is None and self._frozen is not None:
            listed |= self._frozen.files
        failed = failed or self._lacks(job.temporary, listed)
        if failed is None and self._sharing.leads:
            _, failed = _attempt(lambda: self._complete(job, listed))
        failed = next(filter(None, self._words(failed)), None)
        if failed is None:
            self._frozen = remember(job.target, listed, job.cycle, self._sharing.leads)
        else:
            self._frozen = None  # write them again, whatever has become of the files
            if self._sharing.leads:
                _attempt(lambda: delete(job.temporary))
        self._done.append(job.done(sum(file.size for file in listed.values()), new, failed))
        if failed is None and self._sharing.leads and (error := _attempt(self._after)[1]):
            logger.warning("old checkpoints stay: %s", error)

    def _words(self, mine: object) -> list:
        """Gather a value from every rank. Collective among the threads that write, or between two saves."""
        words = [None] * dist.get_world_size()
        dist.all_gather_object(words, mine, group=self._group)
        return words

    def _link(self, temporary: Path, cycle: int) -> bool:
        """Link the files of frozen weights that an earlier checkpoint has, if they are all still there. Collective.

        What cannot be linked (its checkpoint was moved, deleted or changed, or is on another file system) is written
        again.
        """

        def link() -> list[str]:
            if not self._sharing.leads:
                return []
            delete(temporary)
            return known.link(temporary) if known is not None else []

        known = self._frozen if self._frozen is not None and self._frozen.cycle == cycle else None
        words = self._words(_attempt(link))
        there = {name for names, _ in words for name in names or ()}
        if known is not None and there == known.files.keys() and not any(error for _, error in words):
            return True
        if self._sharing.leads:
            _attempt(lambda: delete(temporary))  # or the files would be written through the links
        self._words(None)
        return False

    def _lacks(self, directory: Path, listed: dict[str, File]) -> str | None:
        """Return which of the listed files no disk has, with its size; None where all are there. Collective."""

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
                if mark(path)[0] == file.size:
                    return True
            except FileNotFoundError:
                if not self._sharing.is_here(path.name):
                    return False
            if file.host == socket.gethostname() or time.monotonic() > deadline:
                return False
            time.sleep(0.2)

    def _complete(self, job: Job, listed: dict[str, File]) -> None:
        """Make what is written a checkpoint."""
        captured = job.captured
        assert captured is not None, "no rank has failed"
        model = captured.model | {"restarts": job.cycle}
        about = Manifest(job.step, job.run, captured.engine, model, listed, installed_versions())
        about.write(job.temporary)
        files.sync(job.temporary)
        with make_way(job.target, keep=self._keeps_replaced):
            os.replace(job.temporary, job.target)
        files.sync(self._directory)
        if not job.is_latest:
            return
        if error := _attempt(lambda: files.write_text(self._directory / LATEST, job.target.name))[1]:
            logger.warning("%s was not written, and nothing needs it: %s", LATEST, error)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return (result, None) or (None, what went wrong): the other ranks wait for an answer, whatever it is."""
    try:
        return work(), None
    except Exception as error:
        logger.debug("checkpoint", exc_info=True)
        return None, f"rank {dist.get_rank()} on {socket.gethostname()}: {type(error).__name__}: {error}"
