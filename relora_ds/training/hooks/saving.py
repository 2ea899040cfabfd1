"""When checkpoints are written, and which of them stay."""

from relora_ds.checkpoint import store
from relora_ds.checkpoint.sharing import Sharing, find_peers
from relora_ds.checkpoint.writer import CheckpointWriter
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.hooks.uploading import Uploads
from relora_ds.training.owned_directory import OwnedDirectory
from relora_ds.training.state import RunState
from relora_ds.training.step import Step
from relora_ds.zero.checkpoints import writer_of


class Checkpoints(Hook):
    """Writes the checkpoints of a run, in the background.

    Attributes:
        writer: of the phase that the run is in; None between phases.
    """

    def __init__(self, directory: OwnedDirectory, uploads: Uploads):
        self.writer: CheckpointWriter | None = None
        self._owned, self._directory, self._uploads = directory, directory.path / "checkpoints", uploads
        self._sharing: Sharing | None = None
        self._newest: int | None = None  # the step of the newest one that is complete

    def on_begin(self, run: RunState) -> None:
        if run.resumed is not None:
            self._newest = run.resumed.manifest.step

    def on_phase(self, run: RunState) -> None:
        if self._sharing is None:  # once, while the disk has room
            self._sharing = find_peers(self._directory)
        source = run.resumed
        self.writer = writer_of(
            run.engine,
            self._directory,
            lambda: self._settle(run),
            None if source is None else (source.directory, source.manifest),
            self._sharing,
        )

    def on_step(self, run: RunState, step: Step) -> None:
        every = run.recipe.checkpoint.every
        if step.applied and (run.step == run.recipe.total_steps or (every and run.step % every == 0)):
            self._save(run)
        self._report(run)

    def on_phase_end(self, run: RunState) -> None:
        if self.writer is not None:
            self._report(run, wait=True)
            self.writer.close()
            self.writer = None

    def newest(self, run: RunState) -> int | None:
        """Wait for the one that is being written; return the step of the newest one, None without any. Collective."""
        self._report(run, wait=True)
        return self._newest

    def secure(self, run: RunState) -> bool:
        """Save the state as it is now, unless that has been done; once more if it fails. Return whether. Collective."""
        for _ in range(2):
            if self.newest(run) != run.step:
                self._save(run)
        return self.newest(run) == run.step

    def _save(self, run: RunState) -> None:
        run.clock.drain()
        self._owned.claim()
        run.collect_losses()  # the window of losses is saved
        assert self.writer is not None, "there is a writer in every phase"
        self.writer.save(run.step, run.saved())
        self._owned.set_status(run.step, "running", run.remark)

    def _report(self, run: RunState, wait: bool = False) -> None:
        """Tell of those that were completed or failed. wait: until all are; then every rank knows the same."""
        assert self.writer is not None, "there is a writer in every phase"
        if wait:
            self.writer.wait()
        for done in self.writer.take_finished():
            if done.error is None:
                self._newest = done.step
            run.emit(Hook.on_checkpoint, done)

    def _settle(self, run: RunState) -> None:
        """Upload the checkpoint that is complete now, and delete what is not kept."""
        self._uploads.add(run)
        settings, held = run.recipe.checkpoint, self._uploads.held()
        assert self._sharing is not None, "a checkpoint has been written"
        store.prune(run.run_dir, settings.keep_last, settings.keep_every, self._sharing.is_here, spared=held)
