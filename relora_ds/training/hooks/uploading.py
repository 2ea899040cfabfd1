"""Checkpoints in an object store: uploaded in the background, and fetched where the disk does not have them."""

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from relora_ds.checkpoint import store
from relora_ds.checkpoint.find import Found, ResumeError, find
from relora_ds.checkpoint.manifest import tag_of
from relora_ds.checkpoint.sharing import find_peers
from relora_ds.remote.hosts import Hosts
from relora_ds.remote.lease import Lease
from relora_ds.remote.newest import find_newest
from relora_ds.remote.place import Place, RemoteError
from relora_ds.remote.stored_run import StoredRun
from relora_ds.remote.uploader import Uploader
from relora_ds.training import compatibility
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.lock import this_process
from relora_ds.training.owned_directory import OwnedDirectory
from relora_ds.training.remote_rules import occupied, refused
from relora_ds.training.run_directory import lost_checkpoints
from relora_ds.training.state import RunState
from relora_ds.training.step import Step

END_S = 600  # that the end of a run waits for the last upload
_SMALL_FILES_S = 30  # that it waits for those which have changed since


class Uploads(Hook):
    """The run in the store that `checkpoint.remote` names. Without that, nothing happens.

    Args:
        beat: tells the watchdog that a rank waits on purpose.
    """

    def __init__(self, directory: OwnedDirectory, beat: Callable[[], None]):
        self._owned, self._beat = directory, beat
        self._run: StoredRun | None = None
        self._lease: Lease | None = None  # rank 0's
        self._uploader: Uploader | None = None
        self._failed: str | None = None  # the newest checkpoint, where its upload failed

    def claim(self, run: RunState) -> None:
        """See to it that no other process writes there. Collective.

        Raises:
            ResumeError: on every rank, where one does, or the store refuses.
        """
        recipe = run.recipe
        if recipe.checkpoint.remote is None:
            return
        self._run = stored = StoredRun(Place(recipe.checkpoint.remote))

        def take() -> list[str]:
            self._lease = Lease(stored.place, this_process(), str(recipe.run_dir))
            self._lease.take(dead=self._owned.previous_holder)
            return occupied(recipe, stored)

        self._on_rank_0(run, take)

    def find(self, run: RunState) -> Found | None:
        """Return the checkpoint to resume from, as `checkpoint.find.find`; fetch it if need be. Collective."""
        plan, recipe = run.plan, run.recipe
        if self._run is None or recipe.resume != "auto":
            return find(run.run_dir, recipe.resume)
        found = find_newest(
            self._run,
            run.run_dir,
            lambda manifest: compatibility.require_same_run(manifest, plan),
            lambda manifest: not compatibility.changes(manifest, plan),
        )
        if found is None:
            self._on_rank_0(run, lambda: lost_checkpoints(recipe))
        return found

    def on_begin(self, run: RunState) -> None:
        if self._run is None or self._uploader is not None:  # after a rollback
            return
        settings, stored, lease = run.recipe.checkpoint, self._run, self._lease
        self._on_rank_0(run, lambda: self._roll_back(run, stored))
        self._uploader = Uploader(
            stored,
            run.run_dir,
            Hosts(find_peers(run.run_dir / "checkpoints")),
            lambda: lease.require() if lease is not None else None,
            lambda: stored.prune(settings.keep_last, settings.keep_every),
        )
        self._uploader.start(leads=dist.get_rank() == 0)
        if self._failed is not None:
            self._uploader.add(self._failed)

    def on_step(self, run: RunState, step: Step) -> None:
        self._report(run)

    def add(self, run: RunState) -> None:
        """Have the newest checkpoint uploaded, on rank 0. Called in the background."""
        if self._uploader is not None and dist.get_rank() == 0:
            self._uploader.add(store.directories(run.run_dir)[-1].name)

    def held(self) -> list[str]:
        """Return the checkpoints that the disks must keep until they are uploaded."""
        return [] if self._uploader is None else self._uploader.held()

    def finish(self, run: RunState, seconds: float) -> str:
        """Wait for the last upload; a failed one is tried once more. Collective.

        Returns:
            What is not there, "" where everything is; the same on every rank.
        """
        if self._uploader is None:
            return ""
        deadline, is_retried, said = time.monotonic() + seconds, False, [False, ""]
        while not said[0]:
            self._beat()
            if dist.get_rank() == 0:
                is_late, is_idle = time.monotonic() >= deadline, self._uploader.is_idle()
                self._report(run)
                if is_late and not is_idle:
                    run.remarks["upload"] = f"the last upload to {self._url} did not end within {seconds:g} s"
                elif is_idle and self._failed is not None and not (is_retried or is_late):
                    is_retried, is_idle = True, False
                    self._uploader.add(self._failed)
                said = [is_idle or is_late, run.remarks.get("upload", "")]
            dist.broadcast_object_list(said, 0)
            if not said[0]:
                time.sleep(0.1)
        if dist.get_rank() == 0 and not said[1]:
            self._uploader.put_small_files(max(1.0, deadline - time.monotonic()))
        return str(said[1])

    def on_end(self, run: RunState, summary: dict[str, Any]) -> None:
        """Upload the small files once more: scores on tasks came after `finish`."""
        if self._uploader is not None and dist.get_rank() == 0 and not run.remarks.get("upload"):
            self._uploader.put_small_files(_SMALL_FILES_S)

    def close(self, run: RunState) -> None:
        if self._uploader is not None:
            self._uploader.close()
        if self._lease is not None:
            self._lease.close()

    @property
    def _url(self) -> str:
        assert self._run is not None, "there is a remote"
        return self._run.place.url

    def _roll_back(self, run: RunState, stored: StoredRun) -> list[str]:
        """Have the store agree with the run directory as it is now."""
        if run.recipe.overwrite:
            stored.delete()
        if run.resumed is not None:
            stored.drop_after(run.resumed.manifest.step)
            tag = run.resumed.directory.name
            if run.resumed.directory.parent == run.run_dir / "checkpoints" and tag not in stored.complete():
                self._failed = tag
        return []

    def _report(self, run: RunState) -> None:
        """Tell of the uploads that have ended, on rank 0."""
        if self._uploader is None:
            return
        for done in self._uploader.take_finished():
            self._failed = None if done.error is None else tag_of(done.step)
            was, is_there = run.remark, done.error is None
            lacks = f"the checkpoint after step {done.step} is not in {self._url}: {done.error}"
            run.remarks["upload"] = "" if is_there else lacks
            run.emit(Hook.on_upload, done)
            if run.remark != was:
                self._owned.set_status(run.step, "running", run.remark)

    def _on_rank_0(self, run: RunState, look: Callable[[], list[str]]) -> None:
        """Do on rank 0 what returns problems. ResumeError, on every rank, where there are some."""
        problems: list = [[]]
        if dist.get_rank() == 0:
            try:
                problems = [look()]
            except RemoteError as error:
                problems = [[refused(run.recipe, error)]]
            except ValueError as error:
                problems = [[str(error)]]
        dist.broadcast_object_list(problems, 0)
        if problems[0]:
            raise ResumeError("; ".join(problems[0]))
