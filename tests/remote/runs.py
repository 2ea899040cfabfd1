"""Runs whose checkpoints are uploaded to a faulty store."""

import contextlib
import io
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

from relora_ds.checkpoint import store as disk
from relora_ds.remote import lease
from relora_ds.training.exit_codes import Preempted
from relora_ds.training.hooks import Hook
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.remote import stores

SETTINGS = [
    "train.steps=24",
    "checkpoint.every=6",
    "eval.samples=0",
    "precision=bf16",
    "log.to=[]",
]


@contextlib.contextmanager
def quick_lease(dead_s: float = 0.3):
    with (
        mock.patch.object(lease, "RENEW_S", dead_s / 6),
        mock.patch.object(lease, "DEAD_S", dead_s),
        mock.patch.object(lease, "SETTLE_S", 0.01),
    ):
        yield


class Listener(Hook):
    """Attributes: uploads: as they were told of; on_disk: the most checkpoints that were there at a time."""

    def __init__(self, sigterm_at: int | None = None):
        self.uploads, self.on_disk, self._sigterm_at = [], 0, sigterm_at

    def on_step(self, run, step):
        self.on_disk = max(self.on_disk, len(disk.directories(run.run_dir)))
        if run.step == self._sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_upload(self, run, uploaded):
        self.uploads.append(uploaded)


def fit(
    overrides: list[str], faults=(), sigterm_at: int | None = None, dead_s: float = 0.3
) -> tuple[str, Listener, str]:
    """On a rank: train. Returns (what was printed, what was heard, the message of a run that was stopped).

    faults: (name of a function of `stores`, its arguments).
    """
    stores.FAULTS[:] = [getattr(stores, name)(*arguments) for name, *arguments in faults]
    stores.FaultyStore.most = 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    said, heard, stopped = io.StringIO(), Listener(sigterm_at), ""
    try:
        with quick_lease(dead_s), contextlib.redirect_stdout(said):
            Trainer(check("tiny", [*SETTINGS, *overrides]), [heard]).fit()
    except Preempted as error:
        stopped = str(error)
    finally:
        stores.FAULTS.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return said.getvalue(), heard, stopped


def settings_of(run_dir: Path, store: Path) -> list[str]:
    return [f"run_dir={run_dir}", f"checkpoint.remote={stores.url(store)}", "resume=auto"]


def wipe(run_dir: Path) -> None:
    shutil.rmtree(run_dir)


def stored(store: Path) -> dict[str, bool]:
    """Whether each checkpoint of the store is complete."""
    return {path.name: (path / "manifest.json").is_file() for path in sorted((store / "checkpoints").glob("step_*"))}
