"""Stop a run that is asked to, by SIGTERM or SIGUSR1 to any rank, with its state saved.

Launchers signal processes one after the other, so ranks hear of it at different steps. Each says in every step whether
it has; they stop at the step at which all know it, which is one or two later.
"""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from relora_ds.training.exit_codes import GuardError, Preempted
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.hooks.saving import Checkpoints
from relora_ds.training.hooks.uploading import Uploads
from relora_ds.training.state import RunState
from relora_ds.training.step import Step
from relora_ds.zero.start import host_group

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """What this rank has heard, and what all of them know. From here on the signals do not end the process.

    The `deepspeed` command dies of a signal without telling the ranks, and any launcher can be killed; they would train
    on for ever without it. So its end is heard like a signal.
    """

    def __init__(self) -> None:
        self.heard: str | None = None
        self._launcher = _launcher()
        self._group = host_group()  # no device waits for it
        self._asked = torch.zeros(1)
        self._work: dist.Work | None = None
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def _hear(self, number: int, _frame) -> None:
        self.heard = signal.Signals(number).name

    def has_heard(self) -> bool:
        """Return whether this rank has heard of it by now."""
        if self.heard is None and self._launcher is not None and self._launcher != _launcher():
            self.heard = "the end of its launcher"
        return self.heard is not None

    def agreed(self) -> bool:
        """Return True if a rank had heard of it at the last call, on every rank the same. Collective, once a step.

        It answers with the sum that was begun a step ago, so that nobody waits for it.
        """
        before, work = self._asked, self._work
        self._asked = torch.tensor([float(self.has_heard())])
        self._work = dist.all_reduce(self._asked, group=self._group, async_op=True)
        if work is None:
            return False
        work.wait()
        if before.item():
            self.heard = self.heard or "another rank was"
        return bool(before.item())

    def close(self) -> None:
        """Give the signals back. Where one was heard, the process is about to end; those that follow are ignored."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.heard else handler or signal.SIG_DFL)
        self._work = None
        dist.destroy_process_group(self._group)


class Preemption(Hook):
    """Saves and ends the run where it was asked to stop."""

    def __init__(self, checkpoints: Checkpoints, uploads: Uploads):
        self.request: StopRequest | None = None
        self._checkpoints, self._uploads = checkpoints, uploads

    def on_begin(self, run: RunState) -> None:
        if self.request is None:
            self.request = StopRequest()

    def on_phase(self, run: RunState) -> None:
        assert self.request is not None, "the run has begun"
        if run.engine.exchange is not None:
            run.engine.exchange.stop_when(self.request.has_heard)

    def note_stop(self) -> None:
        """Note that a rank was asked to stop, on all others too: each ignores the signals that follow."""
        if self.request is not None:
            self.request.heard = self.request.heard or "another rank was"

    def on_step(self, run: RunState, step: Step) -> None:
        assert self.request is not None, "the run has begun"
        if not self.request.agreed():
            return
        asked = f"asked to stop ({self.request.heard})"
        if not self._checkpoints.secure(run):
            raise GuardError(f"{asked}, but the state after step {run.step} could not be saved")
        self._checkpoints.on_phase_end(run)
        lacks = self._uploads.finish(run, run.recipe.checkpoint.remote_stop_s)
        where = f" on this disk, as {lacks}" if lacks else ""
        raise Preempted(f"{asked}; saved after step {run.step}, resume with resume=auto{where}")

    def close(self, run: RunState) -> None:
        if self.request is not None:
            self.request.close()


def _launcher() -> int | None:
    """Return the process that a user started: launch_scripts/start_ranks.py, or the `deepspeed` command.

    The latter starts DeepSpeed's launcher, and that the ranks of this node.
    """
    try:
        parent = Path(f"/proc/{os.getppid()}")
        command = (parent / "cmdline").read_bytes()
        if b"start_ranks.py" in command:
            return os.getppid()
        if b"deepspeed.launcher.launch" not in command:
            return None
        return int((parent / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):  # not on Linux, or the launcher itself is gone
        return None
