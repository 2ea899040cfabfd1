"""What can happen to a run directory: to its files, and to the disk that a process sees them through."""

import builtins
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

from relora_ds.checkpoint.store import directories

ALL_THAT_TRAIN = frozenset({"resume", "overwrite", "requeue"})


@dataclass(frozen=True)
class Accident:
    """One thing that goes wrong between two starts.

    Attributes:
        cause: changes the files of a run.
        disk: a context in which a process then sees the run directory.
        of: the run that it happens to, a field of `scenarios.Templates`.
        may_refuse: the actions that may refuse to go on because of it. All others must do their work.
    """

    cause: Callable[[Path], object] = lambda run: None
    disk: Callable[[Path], AbstractContextManager] = nullcontext
    of: str = "stopped"
    may_refuse: frozenset[str] = frozenset()

    @property
    def unreadable(self) -> bool:
        """Whether the newest checkpoint may be whole, and cannot be read."""
        return self.cause in (newer_format, loop_manifest) or self.disk in (newest_unreadable, manifest_forbidden)


# -- to files ----------------------------------------------------------------------------------------------------


def newest(run: Path) -> Path:
    return directories(run)[-1]


def truncate_weights(run: Path) -> None:
    path = newest(run) / "trained_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def flip_weights(run: Path) -> None:
    path = newest(run) / "trained_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_frozen_weights(run: Path) -> None:
    """Only the newest checkpoint's name of them: the others are links to the same bytes."""
    for path in newest(run).glob("frozen_*"):
        path.unlink()


def move_newest_away(run: Path) -> None:
    newest(run).rename(run.with_name(f"{run.name}_archive"))


def cut_manifest(run: Path) -> None:
    path = newest(run) / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


def newer_format(run: Path) -> None:
    path = newest(run) / "manifest.json"
    content = json.loads(path.read_text())
    content["format"] = 1000
    del content["sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, **content}))


def loop_manifest(run: Path) -> None:
    """Opening it fails with ELOOP, for anybody, root included; the file itself is kept beside it."""
    path = newest(run) / "manifest.json"
    path.rename(path.with_name("manifest.kept"))
    path.symlink_to(path.name)


def lose_all_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def write_bytes(name: str, content: bytes) -> Callable[[Path], None]:
    def cause(run: Path) -> None:
        (run / name).write_bytes(content)

    return cause


def prepend(name: str, content: bytes) -> Callable[[Path], None]:
    def cause(run: Path) -> None:
        (run / name).write_bytes(content + (run / name).read_bytes())

    return cause


def lose(*names: str) -> Callable[[Path], None]:
    def cause(run: Path) -> None:
        for name in names:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return cause


def foreign(name: str) -> Callable[[Path], None]:
    def cause(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("Nobody else has this.\n")

    return cause


def inner_run(run: Path) -> None:
    shutil.copytree(run, run / "seed1")


# -- to the disk -------------------------------------------------------------------------------------------------


@contextmanager
def newest_unreadable(run: Path) -> Iterator[None]:
    """Every file of the newest checkpoint answers with an input/output error when it is opened."""
    broken = newest(run).resolve()
    with _open_fails(lambda path, writes: broken in path.parents, errno.EIO):
        yield


@contextmanager
def manifest_forbidden(run: Path) -> Iterator[None]:
    broken = newest(run).resolve() / "manifest.json"
    with _open_fails(lambda path, writes: path == broken, errno.EACCES):
        yield


@contextmanager
def read_only(run: Path) -> Iterator[None]:
    """A disk that was mounted again read-only, as after an error."""
    inside = run.resolve()

    def refuse(real: Callable) -> Callable:
        def call(path, *rest, **options):
            if _is_inside(path, inside):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real(path, *rest, **options)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("mkdir", "unlink", "remove", "rename", "replace", "rmdir", "symlink", "utime", "truncate"):
            stack.enter_context(mock.patch.object(os, name, refuse(getattr(os, name))))
        stack.enter_context(_open_fails(lambda path, writes: writes and _is_inside(path, inside), errno.EROFS))
        yield


@contextmanager
def late_listing(run: Path, times: int) -> Iterator[None]:
    """The newest checkpoint is not in the first listings, as on a network disk whose attributes are cached."""
    hidden, left = newest(run).name, [times]
    scandir, listdir = os.scandir, os.listdir

    def late_scandir(path="."):
        entries = scandir(path)
        if Path(os.fsdecode(path) if not isinstance(path, int) else ".").name != "checkpoints" or left[0] == 0:
            return entries
        left[0] -= 1
        with entries:
            shown = [entry for entry in entries if entry.name != hidden]
        return _Listing(shown)

    def late_listdir(path="."):
        names = listdir(path)
        return [name for name in names if name != hidden] if left[0] and Path(path).name == "checkpoints" else names

    with mock.patch.object(os, "scandir", late_scandir), mock.patch.object(os, "listdir", late_listdir):
        yield


@contextmanager
def renamed_host(_: Path) -> Iterator[None]:
    with mock.patch.object(socket, "gethostname", lambda: "another-pod"):
        yield


class _Listing(list):
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def close(self):
        """As scandir's."""


def _is_inside(path: object, directory: Path) -> bool:
    if isinstance(path, int):
        return False
    absolute = Path(os.path.abspath(os.fsdecode(path)))
    return absolute == directory or directory in absolute.parents


@contextmanager
def _open_fails(where: Callable[[Path, bool], bool], number: int) -> Iterator[None]:
    """Fail to open files. where: of an absolute path, and of whether it is opened to be written."""

    def watch(real: Callable, writes: Callable[..., bool]) -> Callable:
        def call(path, *rest, **options):
            if not isinstance(path, int) and where(Path(os.path.abspath(os.fsdecode(path))), writes(*rest, **options)):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *rest, **options)

        return call

    def by_mode(mode="r", *_, **__) -> bool:
        return bool(set(mode) & set("wax+"))

    def by_flags(flags, *_, **__) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    opened = watch(io.open, by_mode)
    with (
        mock.patch.object(builtins, "open", opened),
        mock.patch.object(io, "open", opened),
        mock.patch.object(os, "open", watch(os.open, by_flags)),
    ):
        yield


ACCIDENTS = {
    "nothing": Accident(),
    "nothing, the run is finished": Accident(of="finished"),
    "rank 0 was killed in a save": Accident(of="killed"),
    # checkpoints
    "newest: weights cut short": Accident(truncate_weights, may_refuse=frozenset({"export"})),
    "newest: a bit flipped": Accident(flip_weights, may_refuse=frozenset({"export"})),
    "newest: frozen weights lost": Accident(lose_frozen_weights, may_refuse=frozenset({"export"})),
    "newest: moved to an archive": Accident(move_newest_away),
    "newest: manifest cut short": Accident(cut_manifest, may_refuse=frozenset({"export"})),
    "newest: of a newer format": Accident(newer_format, may_refuse=frozenset({"resume", "requeue", "export"})),
    "newest: its manifest is a loop of links": Accident(
        loop_manifest, may_refuse=frozenset({"resume", "requeue", "overwrite", "export"})
    ),
    "newest: input/output errors": Accident(
        disk=newest_unreadable, may_refuse=frozenset({"resume", "requeue", "export"})
    ),
    "newest: permission denied": Accident(
        disk=manifest_forbidden, may_refuse=frozenset({"resume", "requeue", "export"})
    ),
    **{
        f"newest: not in {times} listings": Accident(
            disk=partial(late_listing, times=times), may_refuse=frozenset({"resume", "requeue"})
        )
        for times in (1, 2, 3, 4)
    },
    "finished, all checkpoints deleted": Accident(
        lose_all_checkpoints, of="finished", may_refuse=frozenset({"resume", "requeue", "prune", "verify"})
    ),
    "stopped, all checkpoints deleted": Accident(
        lose_all_checkpoints, may_refuse=frozenset({"resume", "requeue", "prune", "verify", "export"})
    ),
    # small files
    "latest: a bad byte": Accident(write_bytes("checkpoints/latest", b"step_\xff0000012")),
    "latest: leads out of the run": Accident(write_bytes("checkpoints/latest", b"../../step_00000012")),
    "latest: lost": Accident(lose("checkpoints/latest")),
    "metrics: a line null": Accident(prepend("metrics.jsonl", b"null\n")),
    "metrics: lines of other kinds": Accident(prepend("metrics.jsonl", b'[]\n3\n"text"\n{}\n{"kind": "eval"}\n\n')),
    "metrics: bad bytes": Accident(prepend("metrics.jsonl", b"\xff\x00\xfe\n")),
    "metrics: lost": Accident(lose("metrics.jsonl")),
    "status: cut short": Accident(write_bytes("status.json", b'{"state": "fa')),
    "status: empty": Accident(write_bytes("status.json", b"")),
    "status: a list": Accident(write_bytes("status.json", b"[]")),
    "status: bad bytes": Accident(write_bytes("status.json", b"\xff\xff")),
    "status: lost": Accident(lose("status.json")),
    "recipe: cut short": Accident(write_bytes("recipe.yaml", b"train: {steps: ")),
    "recipe: lost": Accident(lose("recipe.yaml")),
    "recipe and status: cut short": Accident(
        lambda run: [write_bytes(name, b"{")(run) for name in ("recipe.yaml", "status.json")]
    ),
    "summary: cut short": Accident(write_bytes("summary.json", b"{"), of="finished"),
    "tokenizer: cut short": Accident(
        write_bytes("checkpoints/tokenizer/tokenizer.json", b"{"), may_refuse=frozenset({"export"})
    ),
    "tokenizer: lost": Accident(lose("checkpoints/tokenizer")),
    "tensorboard: lost": Accident(lose("tensorboard")),
    # what is not ours
    "a note in the run": Accident(foreign("notes.md"), may_refuse=frozenset({"overwrite"})),
    "a note beside the checkpoints": Accident(foreign("checkpoints/notes.md"), may_refuse=frozenset({"overwrite"})),
    "a folder in the export": Accident(
        foreign("export/mine/a.txt"), of="finished", may_refuse=frozenset({"overwrite"})
    ),
    "a run in the run": Accident(inner_run, may_refuse=frozenset({"overwrite"})),
    # the machine
    "another host name": Accident(disk=renamed_host),
    "a read-only disk": Accident(disk=read_only, may_refuse=ALL_THAT_TRAIN | {"prune"}),
}
