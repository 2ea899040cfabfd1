"""The server's directory: what it remembers, and the rounds.

state.json, lock
history.jsonl                                   a line for each decision
rounds/00000012/decision.json, agreed.json
rounds/00000012/ISLAND/INCARNATION/00003.blobs  one rank's part, and its index in 00003.json
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from relora_ds.islands.refusals import LinkRefused
from relora_ds.islands.remembered import Part, State
from relora_ds.utils import files


class Rounds:
    """A server's directory, locked until `close` or the end of the process.

    Raises:
        ValueError: another server has it, or it holds something else. OSError: it cannot be read or written.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._lock = _lock(directory)
        self._saved: dict[str, Any] | None = None

    def close(self) -> None:
        """Free the directory."""
        self._lock.close()

    def load(self) -> State:
        """Return what an earlier server remembered, and remove what it had not told anybody of.

        Raises:
            ValueError: it cannot be read.
        """
        path = self.directory / "state.json"
        try:
            state = State.of_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            state = State()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: it is not what a server writes ({error}); use another directory") from error
        for round in self._numbers():
            if round > state.decided + 1:
                shutil.rmtree(self._of(round))
        self.remove_before(state.oldest)
        self._repair_history(state.decided)
        return state

    def save(self, state: State) -> None:
        """Write the state, if it is another one than before. It is on the disk then."""
        value = state.as_json()
        if value != self._saved:
            files.write_json(self.directory / "state.json", value)
            self._saved = value

    def stem(self, round: int, island: str, incarnation: str, rank: int) -> Path:
        """Return the path of a rank's part, without the ending."""
        return self._of(round) / island / incarnation / f"{rank:05d}"

    def parts(self, round: int, island: str, incarnation: str) -> dict[int, Part]:
        """Return the parts that are whole, by rank."""
        paths = sorted((self._of(round) / island / incarnation).glob("*.json"))
        return {int(path.stem): Part(**json.loads(path.read_text(encoding="utf-8"))) for path in paths}

    def write_decision(self, decision: dict[str, Any], incarnations: dict[str, str]) -> None:
        """Write a decision, and a line of it into the history. It counts once the state says so, too."""
        round = decision["round"]
        files.write_json(self._of(round) / "decision.json", {**decision, "incarnations": incarnations})
        with open(self.directory / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(decision) + "\n")
            files.sync(file)

    def drop_others(self, round: int, incarnations: dict[str, str]) -> None:
        """Delete the parts of a decided round that it does not consist of."""
        for path in self._of(round).glob("*/*"):
            if path.is_dir() and incarnations.get(path.parent.name) != path.name:
                shutil.rmtree(path)

    def decision(self, round: int) -> dict[str, Any]:
        """Return the decision of a round that is kept."""
        return json.loads((self._of(round) / "decision.json").read_text(encoding="utf-8"))

    def index(self, round: int, island: str) -> dict[str, tuple[int, int, int]]:
        """Return where the blobs of an island are: name -> (rank, offset, size). The round is decided.

        Raises:
            LinkRefused: the round does not consist of this island.
        """
        return _index(self._contribution(round, island))

    def read(self, round: int, island: str, ranges: list[tuple[int, int, int]]) -> bytes:
        """Return bytes of an island's blobs, given as (rank, offset, size), one after the other.

        Raises:
            LinkRefused: there are no such bytes.
        """
        directory, found = self._contribution(round, island), bytearray()
        with contextlib.ExitStack() as opened:
            ranks: dict[int, IO] = {}
            for rank, offset, size in ranges:
                path = directory / f"{rank:05d}.blobs"
                if rank not in ranks and path.exists():
                    ranks[rank] = opened.enter_context(open(path, "rb"))
                data = os.pread(ranks[rank].fileno(), size, offset) if rank in ranks else b""
                if len(data) != size:
                    raise LinkRefused(f"ranges: rank {rank} of {island!r} has no bytes {offset} to {offset + size}")
                found += data
        return bytes(found)

    def agree(self, round: int, digests: dict[str, int]) -> tuple[str, int] | None:
        """Keep the first digest of each tensor.

        Returns:
            None, or the first tensor whose digest is another one, and the one that is kept.
        """
        path = self._of(round) / "agreed.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name, digest in digests.items():
            if kept.get(name, digest) != digest:
                return name, kept[name]
        if digests.keys() - kept.keys():
            files.write_json(path, {**kept, **digests})
        return None

    def remove_before(self, oldest: int) -> list[int]:
        """Delete the rounds before `oldest`; returns their numbers."""
        gone = [round for round in self._numbers() if round < oldest]
        for round in gone:
            shutil.rmtree(self._of(round))
        return gone

    def _of(self, round: int) -> Path:
        return self.directory / "rounds" / f"{round:08d}"

    def _numbers(self) -> list[int]:
        return sorted(int(path.name) for path in (self.directory / "rounds").glob("*") if path.name.isdecimal())

    def _contribution(self, round: int, island: str) -> Path:
        incarnations = self.decision(round)["incarnations"]
        if island not in incarnations:
            raise LinkRefused(f"island: {island!r} is not in round {round}, which has {', '.join(incarnations)}")
        return self._of(round) / island / incarnations[island]

    def _repair_history(self, decided: int) -> None:
        """Remove lines that a killed server had not finished, or wrote of a decision that it had not told."""
        path = self.directory / "history.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["round"] <= decided]
        if whole != lines:
            files.write_text(path, "".join(whole))


@lru_cache(maxsize=32)  # every rank of every island asks for it
def _index(contribution: Path) -> dict[str, tuple[int, int, int]]:
    found, offset = {}, 0
    for path in sorted(contribution.glob("*.json")):
        offset = 0
        for name, size in json.loads(path.read_text(encoding="utf-8"))["index"].items():
            found[name] = (int(path.stem), offset, size)
            offset += size
    return found


def _lock(directory: Path) -> IO:
    file = open(directory / "lock", "a", encoding="utf-8")  # noqa: SIM115
    try:
        is_free = lock_descriptor(file.fileno(), blocking=False)
    except OSError:  # a file system without locks
        is_free = True
    if not is_free:
        file.close()
        raise ValueError(f"directory: {directory} is used by another server; stop that one, or take another directory")
    return file
