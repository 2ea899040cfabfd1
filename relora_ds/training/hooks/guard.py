"""Which steps are not to be trusted, and when to give up.

non-finite    DeepSpeed and the engine find it: no rank applies the step
loss spike    found in a loss far above those before it (`training.spikes`); `guard.on_spike` says what follows
too many      steps in a row that were not applied end the run
"""

from dataclasses import asdict

from relora_ds.checkpoint.find import Found, find
from relora_ds.config import GuardConfig
from relora_ds.training.exit_codes import GuardError
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.hooks.saving import Checkpoints
from relora_ds.training.spikes import Spike
from relora_ds.training.state import RunState
from relora_ds.training.step import Step

MAX_ROLLBACKS = 3  # to the same checkpoint


class RollBack(Exception):
    """A spike was found, and the run is to go back to its newest checkpoint."""

    def __init__(self, spike: Spike):
        super().__init__(str(spike))
        self.spike = spike


class BadSteps:
    """Counts steps in a row that no rank applied; at `guard.max_bad_steps` the run stops."""

    def __init__(self, settings: GuardConfig):
        self._most = settings.max_bad_steps
        self._in_a_row = 0

    def record(self, applied: bool) -> None:
        """Report a step. Raises GuardError after `max_bad_steps` bad ones in a row."""
        self._in_a_row = 0 if applied else self._in_a_row + 1
        if self._in_a_row >= self._most:
            raise GuardError(
                f"guard.max_bad_steps: {self._in_a_row} steps in a row had a non-finite loss or gradient, "
                "or a loss spike; none was applied. Lower optim.lr, or look at the data of these steps"
            )


class Guard(Hook):
    """Counts bad steps, and has the run go back to a checkpoint where the recipe wants that."""

    def __init__(self, settings: GuardConfig, checkpoints: Checkpoints):
        self._rolls_back = settings.on_spike == "rollback"
        self._bad_steps, self._checkpoints = BadSteps(settings), checkpoints
        self._rolled_back: list[int] = []  # the steps of the checkpoints
        self._came_from: tuple[int, Spike] | None = None  # the step that was left, and why

    def on_phase(self, run: RunState) -> None:
        if self._came_from is not None:
            step, spike = self._came_from
            self._came_from = None
            run.emit(Hook.on_spike, run.step, spike, rolled_back_from=step)

    def on_step(self, run: RunState, step: Step) -> None:
        if step.spike is not None:
            run.emit(Hook.on_spike, run.step, step.spike)
        self._bad_steps.record(step.applied)
        if step.spike is not None and self._rolls_back and self._checkpoints.newest(run) is not None:
            raise RollBack(step.spike)

    def go_back(self, run: RunState, spike: Spike) -> Found:
        """Return the newest checkpoint, with the data where the run is: else the same spike would come. Collective.

        Raises:
            GuardError: there is none, or the run has gone back to it too often.
        """
        run_dir = run.run_dir
        checkpoint = find(run_dir, "auto") or find(run_dir, run.recipe.resume)
        if checkpoint is None:
            raise GuardError("guard.on_spike: rollback, and no checkpoint could be written to go back to")
        step, saved = checkpoint.manifest.step, checkpoint.manifest.run
        if self._rolled_back.count(step) == MAX_ROLLBACKS:
            raise GuardError(
                f"guard.on_spike: {MAX_ROLLBACKS} times back to step {step}, and a loss spike each time, "
                "with other data; lower optim.lr"
            )
        self._rolled_back.append(step)
        self._came_from = run.step, spike
        saved["loader"] = run.loader.state_dict()
        # What the steps that are taken back cost stays in the totals.
        was = saved["account"]
        saved["account"] = asdict(run.totals) | {
            "step": was["step"],
            "restarts": was["restarts"],
            "rollbacks": run.totals.rollbacks + 1,
        }
        return checkpoint
