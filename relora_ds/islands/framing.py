"""Messages between a client and the server: a header in JSON, checked field by field, and at most one raw frame."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CHUNK = 1 << 20  # bytes of blobs in one message: small, so that a slow link shows progress
WINDOW = 64  # messages under way without an answer: 64 MiB keep a link of 100 ms busy
MAX_FRAME = 32 << 20  # a header names every blob of an island
Check = Callable[[Any], bool]


class MalformedError(ValueError):
    """Say what is wrong with a message.

    Attributes:
        number: the id of the request, if it has one.
    """

    def __init__(self, text: str, number: int | None = None):
        super().__init__(text)
        self.number = number


@dataclass(frozen=True)
class Message:
    """A message whose header has been checked."""

    kind: str
    fields: dict[str, Any]
    payload: bytes = b""


def pack(message: Message) -> list[bytes]:
    """Return the frames of a message.

    Raises:
        ValueError: a value is not JSON, or the header is larger than a frame may be.
    """
    try:
        header = json.dumps({"kind": message.kind, **message.fields}, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{message.kind}: it holds a value that JSON cannot carry ({error})") from error
    if len(header) > MAX_FRAME:
        raise ValueError(f"{message.kind}: its header has {len(header)} bytes; at most {MAX_FRAME} can be sent")
    return [header, message.payload] if message.payload else [header]


def unpack(frames: Sequence[bytes], kinds: Mapping[str, Mapping[str, Check]]) -> Message:
    """Return the message that frames hold: of a known kind, with exactly its fields, each as its check wants it.

    Raises:
        MalformedError: anything else.
    """
    if len(frames) not in (1, 2):
        raise MalformedError(f"a message has one or two frames, not {len(frames)}")
    try:
        header = json.loads(frames[0], parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"a header is not JSON: {str(error)[:80]}") from None
    if not isinstance(header, dict):
        raise MalformedError("a header is not a JSON object")
    number = header.get("id") if type(header.get("id")) is int else None
    kind = header.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise MalformedError(f"kind: {kind!r:.40} is unknown; the same version of relora_ds is needed", number)
    checks = kinds[kind]
    if header.keys() != checks.keys():
        wrong = sorted(header.keys() ^ checks.keys())[0]
        what = "is missing" if wrong in checks else "is unknown"
        raise MalformedError(f"{kind}: the field {wrong:.40} {what}; the same version of relora_ds is needed", number)
    for name, check in checks.items():
        if not check(header[name]):
            raise MalformedError(f"{kind}: {name} = {header[name]!r:.80} is not allowed", number)
    payload = frames[1] if len(frames) == 2 else b""
    if len(payload) > CHUNK:
        raise MalformedError(f"{kind}: {len(payload)} bytes of blobs are too many; at most {CHUNK} are sent", number)
    return Message(kind, header, payload)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value
