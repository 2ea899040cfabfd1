"""Fetch a checkpoint from a store to the disks of the ranks. All ranks share the work."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from relora_ds.checkpoint import manifest
from relora_ds.checkpoint.find import ResumeError, of_all_ranks
from relora_ds.checkpoint.manifest import DamagedError, Manifest
from relora_ds.checkpoint.removal import delete, free
from relora_ds.checkpoint.sharing import Sharing, find_peers
from relora_ds.checkpoint.store import error_in
from relora_ds.remote.place import RemoteMissingError
from relora_ds.remote.stored_run import StoredRun, path_of
from relora_ds.utils import files
from relora_ds.utils.text import human_bytes

logger = logging.getLogger(__name__)


class Fetching:
    """Fetches checkpoints. Collective: all ranks make every call.

    Args:
        directory: where the checkpoints of this rank are.
        require, is_same: see `newest.find_newest`.

    Attributes:
        has_fetched: whether one was.
    """

    def __init__(
        self, run: StoredRun, directory: Path, require: Callable[[Manifest], None], is_same: Callable[[Manifest], bool]
    ):
        self._run, self._directory, self._require, self._is_same = run, directory, require, is_same
        self._sharing: Sharing | None = None
        self.has_fetched = False

    def fetch(self, tag: str) -> str | None:
        """Put a checkpoint of the store in its place; return why it cannot be used, or None.

        A file that is here already is not fetched again.

        Raises:
            ResumeError: on every rank, where the store or a disk refuses, or the run cannot resume from it.
        """
        where = f"{self._run.place.url}/checkpoints/{tag}"
        text, about = self._manifest(tag, where)
        if about is None:
            return f"{where} is damaged: {text}"
        self._require(about)
        if self._sharing is None:
            self._sharing = find_peers(self._directory)
        temporary = self._directory / f".{tag}.fetched"
        sharing, sent = self._sharing, 0

        def begin() -> None:
            if sharing.leads:
                delete(temporary)
                temporary.mkdir()

        def take() -> None:
            nonlocal sent
            sent = sum(self._take(tag, name, about, temporary) for name in self._share(about, sharing))

        def put_in_place() -> None:
            if sharing.leads:
                self._put_in_place(temporary, tag, text)

        try:
            for work in (begin, take, put_in_place):
                _together(work, where)
        except DamagedError as error:
            if sharing.leads:
                delete(temporary)
            return f"{where} is damaged: {error}"
        self.has_fetched = True
        total = sum(of_all_ranks(sent))
        if dist.get_rank() == 0:
            logger.info("resume: fetched %s, %s", where, human_bytes(total))
        return None

    def _manifest(self, tag: str, where: str) -> tuple[str, Manifest | None]:
        """Return (the text of a manifest, what it says), or (what is wrong with it, None). Rank 0 reads it."""
        said: list = ["", None]

        def read() -> None:
            if dist.get_rank() == 0:
                with tempfile.TemporaryDirectory() as directory:
                    path = Path(directory, manifest.NAME)
                    self._run.place.get(path_of(tag, manifest.NAME), path)
                    try:
                        said[1] = manifest.read(Path(directory))
                    except DamagedError as error:
                        raise DamagedError(str(error).replace(f"{directory}/", "")) from error
                    said[0] = path.read_text(encoding="utf-8")

        try:
            _together(read, where)
        except DamagedError as error:
            return str(error), None
        dist.broadcast_object_list(said, 0)
        return said[0], said[1]

    def _share(self, about: Manifest, sharing: Sharing) -> list[str]:
        """Return the files that this rank fetches: those that belong on its disk, one rank after the other."""
        everything = not self._is_same(about)
        names = [name for name in sorted(about.files) if everything or sharing.is_here(name)]
        return names[sharing.peers.index(dist.get_rank()) :: len(sharing.peers)]

    def _take(self, tag: str, name: str, about: Manifest, temporary: Path) -> int:
        """Put one file into the directory, from here or from the store; return the bytes that were sent."""
        here, target, file = self._directory / tag / name, temporary / name, about.files[name]
        if here.is_file() and error_in(here.parent, name, file) is None:
            with contextlib.suppress(OSError):  # a disk without links
                os.link(here, target)
                return 0
        try:
            self._run.place.get(path_of(tag, name), target)
            files.sync(target)
            manifest.check(temporary, name, file)
        except (DamagedError, RemoteMissingError) as error:
            if manifest.is_needed(name):
                raise DamagedError(str(error).replace(f"{temporary}/", "")) from error
            logger.warning("resume: %s, which a run can do without: %s", path_of(tag, name), error)
            target.unlink(missing_ok=True)
        return file.size

    def _put_in_place(self, temporary: Path, tag: str, text: str) -> None:
        """Make the files a checkpoint, by a rename. One that has all of them, on this disk alone, stays."""
        target = self._directory / tag
        pairs = [(target / name, temporary / name) for name in os.listdir(temporary)]
        if target.is_dir() and all(old.is_file() and old.samefile(new) for old, new in pairs):
            files.write_text(target / manifest.NAME, text)
            delete(temporary)
            return
        (temporary / manifest.NAME).write_text(text, encoding="utf-8")
        files.sync(temporary / manifest.NAME)
        files.sync(temporary)
        if os.path.lexists(target):
            os.replace(target, free(target.with_name(f"{tag}.damaged")))
        os.replace(temporary, target)
        files.sync(self._directory)


def _together(work: Callable[[], None], where: str) -> None:
    """Do something on every rank. DamagedError or ResumeError, on all of them, where it fails on one."""
    error = None
    try:
        work()
    except (ValueError, OSError) as reason:
        error = isinstance(reason, (DamagedError, RemoteMissingError)), str(reason)
    errors = [each for each in of_all_ranks(error) if each is not None]
    if refused := [text for is_damaged, text in errors if not is_damaged]:
        raise ResumeError(f"resume: {where} cannot be fetched now ({refused[0]}); start again when it can be")
    if errors:
        raise DamagedError(errors[0][1])
