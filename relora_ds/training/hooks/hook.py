"""The events of a run, and the checks of the hooks that a user passes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from relora_ds.config import RecipeError
from relora_ds.config.rules import nearest

if TYPE_CHECKING:
    from relora_ds.checkpoint.job import Written
    from relora_ds.exchange.report import ExchangeReport
    from relora_ds.remote.uploader import Uploaded
    from relora_ds.training.samples import Sample
    from relora_ds.training.spikes import Spike
    from relora_ds.training.state import RunState
    from relora_ds.training.step import Step
    from relora_ds.training.validation import Evaluation
    from relora_ds.zero.restart import RestartReport


class Hook:
    """Something that happens beside training. Subclass it, and override the events that you need:

        import relora_ds.train

        class Shout(relora_ds.Hook):
            def on_restart(self, run, report):
                print(f"restart {report.restarts} after step {run.step}")

        relora_ds.train.run("quickstart", hooks=[Shout()])

    Every event but `on_upload` is called on every rank, with the run's state: read it, and leave it as it is. All but
    `on_checkpoint`, `on_upload` and `close` come in the same order on all ranks; in those a collective
    (`torch.distributed`) may be called, by all of them. An exception ends the run, and so does a call that takes longer
    than `guard.watchdog_seconds`.
    """

    def on_start(self, run: RunState) -> None:
        """Act when all ranks have met. Nothing is written yet, and the run may still be refused."""

    def on_begin(self, run: RunState) -> None:
        """Act when the run directory is open; `run.resumed` is the checkpoint. Called again after a rollback."""

    def on_phase(self, run: RunState) -> None:
        """Act when a phase begins or is resumed: `run.phase` and `run.engine` are new."""

    def around_step(self, run: RunState) -> AbstractContextManager[object]:
        """Return a context in which a step is taken: forward, backward, optimizer, restart."""
        return nullcontext()

    def on_step(self, run: RunState, step: Step) -> None:
        """Handle a step, applied or not; `step.figures` has numbers in the steps that are logged."""

    def on_spike(self, run: RunState, step: int, spike: Spike, rolled_back_from: int | None = None) -> None:
        """Handle a loss spike, which is found after its `step` was applied, or instead of applying it.

        rolled_back_from: the step that the run was at, where it has gone back to a checkpoint because of it.
        """

    def on_restart(self, run: RunState, report: RestartReport) -> None:
        """Handle a restart, before `on_step` of the step that it followed."""

    def on_exchange(self, run: RunState, report: ExchangeReport) -> None:
        """Handle an exchange between islands, before `on_step` of the step that it followed.

        One that was made good follows no step.
        """

    def on_eval(self, run: RunState, evaluation: Evaluation, samples: list[Sample]) -> None:
        """Handle an evaluation."""

    def on_checkpoint(self, run: RunState, written: Written) -> None:
        """Handle a checkpoint that was written in the background, or failed (`written.error`).

        Ranks may hear of it after different steps: no collective here.
        """

    def on_upload(self, run: RunState, uploaded: Uploaded) -> None:
        """Handle the upload of a checkpoint, or its failure (`uploaded.error`). On rank 0 only: no collective here."""

    def on_phase_end(self, run: RunState) -> None:
        """Act before `run.engine` is released, at the end of a phase or a rollback."""

    def on_end(self, run: RunState, summary: dict[str, Any]) -> None:
        """Act when the run is complete and the model exported."""

    def close(self, run: RunState) -> None:
        """Free what the hook holds. Called last, once, whatever has happened."""


EVENTS = tuple(name for name in vars(Hook) if not name.startswith("_"))


def checked(hooks: Iterable[object]) -> list[Hook]:
    """Return hooks that a user passes.

    Raises:
        RecipeError: one is no `Hook`, or has a method that looks like an event and is none.
    """
    found = list(hooks)
    if problems := [problem for hook in found for problem in _problems(hook)]:
        raise RecipeError(problems)
    return [hook for hook in found if isinstance(hook, Hook)]


def _problems(hook: object) -> list[str]:
    if isinstance(hook, type) and issubclass(hook, Hook):
        return [f"hooks: {hook.__name__} is a class; pass an instance, {hook.__name__}()"]
    if not isinstance(hook, Hook):
        return [f"hooks: {hook!r} is no hook; pass an instance of a subclass of relora_ds.Hook"]
    known = ", ".join(EVENTS)
    return [
        f"hooks: {type(hook).__name__}.{name} is no event{nearest(name, EVENTS)}; the events are {known}"
        for name in dir(type(hook))
        if name.startswith("on_") and name not in EVENTS
    ]
