"""Upload the checkpoints of a run in the background, one at a time.

    rank 0       says which checkpoint is next: the newest one. Those that waited before it are left out
    each host    uploads the files of its ranks
    rank 0       when all have: sees that every file is there with its size, uploads the manifest, deletes what is not
                 kept

Each of these is a thread of the first rank of a host. Whatever fails leaves the complete checkpoints that are there as
they are, and the next one is tried again.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from relora_ds.checkpoint import manifest
from relora_ds.checkpoint.manifest import File, Manifest
from relora_ds.checkpoint.store import step_of
from relora_ds.remote.hosts import Hosts
from relora_ds.remote.place import RemoteError
from relora_ds.remote.stored_run import StoredRun, path_of

logger = logging.getLogger(__name__)

_LOOK_S = 0.2  # between two looks at what other hosts say


@dataclass(frozen=True)
class Uploaded:
    """How an upload went.

    Attributes:
        step: the training step that the checkpoint captures.
        bytes: of all its files; sent_bytes: without those that the store could copy from the checkpoint before.
        upload_s: seconds.
        skipped: checkpoints before it that were not uploaded, as it came before their turn.
        error: why it is not there; None where it is.
    """

    step: int
    bytes: int
    sent_bytes: int
    upload_s: float
    skipped: int
    error: str | None = None


class Uploader:
    """The uploads of a run. Collective: every rank has one.

    Args:
        run_dir: of this rank.
        allow: raises RemoteError where this process may not write there any more.
        keep: deletes old checkpoints there.
    """

    def __init__(
        self, run: StoredRun, run_dir: Path, hosts: Hosts, allow: Callable[[], None], keep: Callable[[], None]
    ):
        self._run, self._run_dir, self._hosts, self._allow, self._keep = run, run_dir, hosts, allow, keep
        self._changed = threading.Condition()
        self._waiting: str | None = None  # tags
        self._current: str | None = None
        self._closed, self._skipped, self._number = False, 0, 0
        self._before: tuple[str, dict[str, File]] | None = None  # what this rank knows to be there
        self._done: list[Uploaded] = []
        self._has_tokenizer = False

    def start(self, leads: bool) -> None:
        """Begin. leads: this is rank 0."""
        if self._hosts.leads:
            work = self._lead if leads else self._follow
            threading.Thread(target=work, name="upload", daemon=True).start()

    def add(self, tag: str) -> None:
        """Have a checkpoint uploaded, on rank 0. One that still waits is left out instead."""
        with self._changed:
            self._skipped += self._waiting is not None
            self._waiting = tag
            self._say_held()
            self._changed.notify()

    def held(self) -> list[str]:
        """Return the checkpoints that must stay on the disks until they are uploaded."""
        return self._hosts.hear("held") or []

    def is_idle(self) -> bool:
        """Return True on rank 0 if nothing is being uploaded, or waits for it."""
        with self._changed:
            return self._waiting is None and self._current is None

    def take_finished(self) -> list[Uploaded]:
        """Return what has ended since the last call, on rank 0."""
        with self._changed:
            done, self._done = self._done, []
        return done

    def put_small_files(self, seconds: float) -> None:
        """Upload them once more, at the end of the run. A store that hangs is not waited for any longer."""

        def put() -> None:
            with contextlib.suppress(RemoteError):  # what a resume needs is there
                self._allow()
                self._run.put_small_files(self._run_dir, with_tokenizer=False)

        last = threading.Thread(target=put, daemon=True)
        last.start()
        last.join(seconds)

    def close(self) -> None:
        """Begin nothing more. What is being sent now is not waited for, and makes no checkpoint."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    # -- in the background ---------------------------------------------------------------------------------------

    def _lead(self) -> None:
        while (tag := self._next()) is not None:
            done = self._upload(tag)
            with self._changed:
                self._done.append(done)
                self._current = None
                with contextlib.suppress(RuntimeError):  # the ranks have parted
                    self._say_held()

    def _next(self) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting is not None)
            self._current, self._waiting = self._waiting, None
            return None if self._closed else self._current

    def _say_held(self) -> None:
        self._hosts.say("held", [tag for tag in (self._current, self._waiting) if tag is not None])

    def _upload(self, tag: str) -> Uploaded:
        started, skipped, size, sent, reason = time.perf_counter(), self._skipped, 0, 0, None
        self._skipped = 0
        try:
            about = manifest.read(self._directory(tag))
            size = sum(file.size for file in about.files.values())
            sent = self._send_everywhere(tag, about)
            self._complete(tag, about)
        except Exception as error:  # a thread that dies would end all later uploads without a word
            logger.debug("upload", exc_info=True)
            reason = str(error)
        else:
            self._before = tag, about.files
            try:
                self._keep()
            except Exception as error:  # the checkpoint itself is there
                logger.warning("checkpoint.remote: old checkpoints stay in %s: %s", self._run.place.url, error)
        return Uploaded(step_of(tag), size, sent, time.perf_counter() - started, skipped, reason)

    def _send_everywhere(self, tag: str, about: Manifest) -> int:
        """Have every host send its files; return the bytes that were sent."""
        self._require_open()
        self._run.break_up(tag)
        number = self._number = self._number + 1
        self._hosts.say(f"job {number}", tag)
        answers = [self._answer(tag, about)]
        for rank in self._hosts.others:  # also after an error: until then they send
            while (answer := self._hosts.hear(f"answer {number} {rank}")) is None:
                self._require_open()
                time.sleep(_LOOK_S)
            answers.append(answer)
        if errors := [error for _, error in answers if error]:
            raise RemoteError(errors[0])
        return sum(sent for sent, _ in answers)

    def _follow(self) -> None:
        with contextlib.suppress(RuntimeError):  # the ranks have parted
            while not self._closed:
                tag = self._hosts.hear(f"job {self._number + 1}")
                if tag is None:
                    time.sleep(_LOOK_S)
                    continue
                self._number += 1
                self._hosts.say(f"answer {self._number} {self._hosts.rank}", self._answer(tag, None))

    def _answer(self, tag: str, about: Manifest | None) -> tuple[int, str | None]:
        """Send this rank's files; return (bytes that were sent, what went wrong or None)."""
        try:
            about = about or manifest.read(self._directory(tag))
            sent = sum(self._send(tag, name, file) for name, file in about.files.items() if self._hosts.is_mine(name))
        except Exception as error:  # a thread that dies would end all later uploads without a word
            logger.debug("upload", exc_info=True)
            self._before = None
            return 0, str(error)
        self._before = tag, about.files
        return sent, None

    def _send(self, tag: str, name: str, file: File) -> int:
        """Upload one file, or have the store copy it; return the bytes that were sent."""
        self._require_open()
        known = self._before[1].get(name) if self._before is not None else None
        if self._before is not None and known is not None and known.sha256 == file.sha256 and self._before[0] != tag:
            with contextlib.suppress(RemoteError):  # retention has deleted it, or the protocol copies nothing
                self._run.place.copy(path_of(self._before[0], name), path_of(tag, name))
                return 0
        self._run.place.put(self._directory(tag) / name, path_of(tag, name))
        return file.size

    def _complete(self, tag: str, about: Manifest) -> None:
        """Make what is there a checkpoint."""
        there = self._run.checkpoints().get(tag, {})
        if lacking := sorted(name for name, file in about.files.items() if there.get(name) != file.size):
            raise RemoteError(f"{path_of(tag, lacking[0])} is not there, or has another size than what was sent")
        self._run.put_small_files(self._run_dir, with_tokenizer=not self._has_tokenizer)
        self._has_tokenizer = True
        self._require_open()
        self._run.place.put(self._directory(tag) / manifest.NAME, path_of(tag, manifest.NAME))

    def _require_open(self) -> None:
        if self._closed:
            raise RemoteError("the run ended before it was uploaded")
        self._allow()

    def _directory(self, tag: str) -> Path:
        return self._run_dir / "checkpoints" / tag
