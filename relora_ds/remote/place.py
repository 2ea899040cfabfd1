"""A directory of an object store, or of anything else that fsspec has a protocol for."""

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

_LONGEST = 300  # characters of an error of a protocol in a message


class RemoteError(OSError):
    """A store did not do what it was asked to; the message is one line."""


class RemoteMissingError(RemoteError):
    """A store does not have what it was asked for."""


class Place:
    """A directory of a store. Paths are relative to it. Every call may take as long as the store takes.

    Attributes:
        url: of it.

    Raises:
        ValueError: fsspec has no such protocol, or its package is not installed.
        RemoteError: the protocol cannot begin, for instance without credentials.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        protocol = self.url.partition("://")[0]
        options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
        try:
            with _in_words():
                self._fs, self._root = url_to_fs(self.url, **options)
        except RemoteError as error:
            cause = error.__cause__
            if isinstance(cause, ImportError):
                package = str(known_implementations.get(protocol, {}).get("class", protocol)).partition(".")[0]
                remedy = f"pip install {package}" if package != "fsspec" else str(cause)
                raise ValueError(
                    f"{url} needs a package for {protocol}://, which is not installed; {remedy}"
                ) from error
            if isinstance(cause, ValueError):  # fsspec's word for an unknown protocol
                raise ValueError(f"{url} cannot be used ({cause}); use e.g. s3://bucket/prefix") from error
            raise

    def files(self, below: str = "") -> dict[str, int]:
        """Return the sizes in bytes of all files below a directory, by path; {} where there is none."""
        with _in_words():
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._path(below), detail=True)
            except FileNotFoundError:
                return {}
        return {
            path.removeprefix(self._root).lstrip("/"): about["size"]
            for path, about in found.items()
            if not path.endswith("/")
        }

    def read(self, path: str) -> bytes:
        """Return the contents of a file. RemoteMissingError where there is none."""
        with _in_words():
            return self._fs.cat_file(self._path(path))

    def write(self, path: str, content: bytes) -> None:
        """Replace a file."""
        with _in_words(), tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self.put(Path(file.name), path)

    def put(self, local: Path, path: str) -> None:
        """Upload a file."""
        with _in_words():
            self._fs.put_file(str(local), self._path(path))

    def get(self, path: str, local: Path) -> None:
        """Download a file. RemoteMissingError where there is none."""
        with _in_words():
            self._fs.get_file(self._path(path), str(local))

    def copy(self, path: str, other: str) -> None:
        """Copy a file within the store, which object stores do without sending it here."""
        with _in_words():
            self._fs.cp_file(self._path(path), self._path(other))

    def delete(self, path: str) -> None:
        """Delete a file, if it is there."""
        with _in_words(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(path))
        if isinstance(self._fs, LocalFileSystem):  # object stores have no empty directories
            with contextlib.suppress(OSError):
                self._fs.rmdir(self._path(path).rpartition("/")[0])

    def probe(self) -> None:
        """Try all that a run needs: to write, list, read and delete."""
        name, content = f".probe-{uuid.uuid4()}", b"relora_ds"
        self.write(name, content)
        if self.files(name).get(name) != len(content) or self.read(name) != content:
            raise RemoteError("what was written there is not found again")
        self.delete(name)

    def _path(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}" if path else self._root


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Make a RemoteError of whatever a protocol raises: each has errors of its own."""
    try:
        yield
    except RemoteError:
        raise
    except Exception as error:  # boto, aiohttp, google.auth, ...: without a common class
        kind = RemoteMissingError if isinstance(error, FileNotFoundError) else RemoteError
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise kind(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…") from error
