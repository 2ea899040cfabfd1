"""Hashes of files, remembered: a corpus of 100 GB is read once to hash it, and not by every rank at every start.

What is remembered of a file is its size, mtime, ctime and inode. While they are the same it counts as unchanged. The
ctime is what makes that safe: a tool can put an old mtime back (`cp -p`, `rsync -t`, `touch -d`), but every write and
every replacement sets the ctime to the present, and nothing short of turning the clock back hides it. Two cases are
read again rather than trusted: a file that changed within the last seconds (a second write inside the clock's
granularity would leave the same times) and one that changed while it was read. What remains is trust in the file
system: a network mount whose server reports wrong times can hide a change. Deleting `CACHE/manifests` forgets all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from relora_ds.data.cache import local_directory, locked
from relora_ds.utils.files import sha256, write_text

# The coarsest clock of a file system in use is FAT's, 2 s.
GRANULARITY_NS = 2_000_000_000


def sha256_of(files: Sequence[Path], cache_root: Path, afresh: bool = False) -> list[str]:
    """sha256 of the contents of each file, in order. Processes of one host wait for the first that hashes.

    afresh: read the files, whatever is remembered. Where `cache_root` cannot be written, what is remembered is in this
    host's temporary directory. Raises OSError for a file that cannot be read.
    """
    names = _names(files)
    with _locked_manifest(files, cache_root) as (manifest, is_writable):
        known = {} if afresh else _read(manifest)
        changed = [name for name in names if known.get(name, [None])[0] != _state(name)]
        if not changed:
            return [known[name][1] for name in names]
        with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
            hashed = dict(zip(changed, threads.map(_hash, changed), strict=True))
        hashes = [hashed[name][1] if name in hashed else known[name][1] for name in names]
        known |= {name: entry for name, entry in hashed.items() if entry[0] is not None}
        if is_writable:
            with contextlib.suppress(OSError):  # a full disk costs the memory of it, not the run
                write_text(manifest, json.dumps({name: known[name] for name in names if name in known}))
    return hashes


def is_remembered(files: Sequence[Path], cache_root: Path) -> bool:
    """Return whether `sha256_of` would read none of the files."""
    known = _read(_manifest_of(files, cache_root))
    return all(known.get(name, [None])[0] == _state(name) for name in _names(files))


def _names(files: Sequence[Path]) -> list[str]:
    return [str(file.resolve()) for file in files]


def _manifest_of(files: Sequence[Path], cache_root: Path) -> Path:
    return cache_root / "manifests" / f"{hashlib.sha256(os.fsencode(chr(0).join(_names(files)))).hexdigest()}.json"


@contextlib.contextmanager
def _locked_manifest(files: Sequence[Path], cache_root: Path) -> Iterator[tuple[Path, bool]]:
    """Lock the manifest of the files; yields (its path, whether it can be written: there may be no such place)."""
    with contextlib.ExitStack() as stack:
        for root in (cache_root, local_directory()):
            manifest = _manifest_of(files, root)
            try:
                stack.enter_context(locked(manifest))
            except (OSError, ValueError):  # a cache that is read-only, or somebody else's
                continue
            yield manifest, True
            return
        yield manifest, False


def _hash(name: str) -> tuple[list[int] | None, str]:
    """Return (the state to remember, or None where the file changed too lately to trust the times; sha256)."""
    started, before = time.time_ns(), _state(name)
    digest = sha256(name)
    settled = before == _state(name) and max(before[1:3]) < started - GRANULARITY_NS
    return before if settled else None, digest


def _state(name: str) -> list[int]:
    stat = Path(name).stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read(manifest: Path) -> dict:
    """{file: [state, sha256]}, without what is no such entry."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError):
        return {}
    return {
        name: entry
        for name, entry in found
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
    }
