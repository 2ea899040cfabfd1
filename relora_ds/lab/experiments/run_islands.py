"""A run that consists of islands, all on this machine: their server, and where each of them is.

In the run's directory:

    rounds/       what the server keeps
    island-N/     the run directory of an island
"""

import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from relora_ds.config import IslandsConfig, Recipe
from relora_ds.islands.requirement import require_zmq
from relora_ds.islands.secret import VARIABLE

ALONE = tuple(
    f"islands.{field.name}={'null' if field.default is None else field.default}" for field in fields(IslandsConfig)
)


def directories(directory: Path, count: int | None) -> list[Path]:
    """Return the run directories of a run: its own, or those of its islands."""
    return [directory] if count is None else [directory / f"island-{index}" for index in range(count)]


def check(recipes: Iterable[Recipe]) -> None:
    """Do nothing where islands can be served, or none of the recipes has any. Raise ValueError elsewhere."""
    if any(recipe.islands.count is not None for recipe in recipes):
        require_zmq()


@contextmanager
def serving(directory: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Serve the islands of the run in `directory`; yields overrides for its islands, and variables of environment."""
    from relora_ds.islands.server import Server

    directory.mkdir(parents=True, exist_ok=True)
    secret = secrets.token_hex(32)
    with open(directory / "server.log", "a", encoding="utf-8") as log:
        server = Server("127.0.0.1:0", directory / "rounds", secret, say=lambda text: print(text, file=log, flush=True))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield [f"islands.address={server.address.removeprefix('tcp://')}"], {VARIABLE: secret}
        finally:
            server.stop()
            thread.join()
