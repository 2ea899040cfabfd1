"""The kinds of messages, and what each field of them may be."""

from __future__ import annotations

import json
import re
from typing import Any

from relora_ds.islands.framing import CHUNK, Check

PROTOCOL = 1  # of these tables; another number refuses a member of another version at once
_LARGEST = 1 << 53  # what JSON of any language carries exactly


def _integer(least: int, most: int = _LARGEST) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0


def _text(most: int) -> Check:
    return lambda value: isinstance(value, str) and 0 < len(value) <= most


def _object(value: Any) -> bool:
    """Return whether a value is an object of at most 64 KiB, since every decision carries those of all islands."""
    return isinstance(value, dict) and _is_flat(value, 16) and len(json.dumps(value)) <= 1 << 16


def _is_flat(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(one, levels - 1) for one in inner)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _table_of(check: Check, key: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(key, value)) and all(map(check, value.values()))


def is_name(value: Any) -> bool:
    """Return whether a value can name an island or an incarnation: it becomes the name of a directory."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value) is not None


def _ranges(value: Any) -> bool:
    """Return whether a value is [[rank, offset, size], ...] of one message."""
    return _list_of(_place)(value) and sum(size for _, _, size in value) <= CHUNK


def _place(value: Any) -> bool:
    return _list_of(_NATURAL)(value) and len(value) == 3


_NATURAL = _integer(0)
_RANK = _integer(0, 1 << 20)
_BLOB = _text(1024)
_SENDER: dict[str, Check] = {"id": _NATURAL, "island": is_name, "incarnation": is_name, "rank": _RANK}

_REQUESTS: dict[str, dict[str, Check]] = {
    "ping": {},
    "join": {
        "protocol": _integer(0),
        "world_size": _integer(1, 1 << 20),
        "count": _integer(1, 1 << 20),
        "identity": _object,
        "done": _NATURAL,
    },
    # A rank's part of a contribution: `index` has the sizes of its blobs in the order of their bytes.
    "begin": {
        "round": _NATURAL,
        "index": _table_of(_NATURAL, _BLOB),
        "facts": _object,
        "keep_from": _NATURAL,
    },
    "part": {"round": _NATURAL, "offset": _NATURAL},
    "decision": {"round": _NATURAL, "wait_s": _number},
    "index": {"round": _NATURAL, "of": is_name},
    "read": {"round": _NATURAL, "of": is_name, "batch": _NATURAL, "ranges": _ranges},
    "agree": {"round": _NATURAL, "digests": _table_of(_integer(-(1 << 64), 1 << 64), _BLOB)},
}
REQUESTS = {kind: {**_SENDER, **fields} for kind, fields in _REQUESTS.items()}

_UPLOAD: Check = ("begin", "send", "done").__contains__  # begin anew, send from `have` on, nothing more to send
_REPLIES: dict[str, dict[str, Check]] = {
    "error": {"text": _text(1 << 16)},
    "joined": {"decided": _NATURAL, "oldest": _NATURAL, "islands": _list_of(is_name), "lease_s": _number},
    "held": {"lease_s": _number, "silent_s": lambda value: value is None or _number(value)},  # of who has the name
    "upload": {"status": _UPLOAD, "have": _NATURAL},
    "decision": {"round": _NATURAL, "islands": _table_of(_object, is_name), "missing": _list_of(is_name)},
    "pending": {},
    "index": {"blobs": _table_of(_place, _BLOB)},  # name -> [rank, offset, size]
    "blobs": {"batch": _NATURAL},
    "agreed": {},
}
REPLIES = {kind: {"id": _NATURAL, **fields} for kind, fields in _REPLIES.items()}
