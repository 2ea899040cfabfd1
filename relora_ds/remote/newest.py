"""Find the newest intact checkpoint of a run, on the disks of its ranks and in a store."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from relora_ds.checkpoint.find import Found, NoneIntactError, ResumeError, find, of_all_ranks
from relora_ds.checkpoint.manifest import Manifest
from relora_ds.checkpoint.run_files import METRICS
from relora_ds.checkpoint.store import directories, step_of
from relora_ds.remote.fetching import Fetching
from relora_ds.remote.place import RemoteError
from relora_ds.remote.stored_run import StoredRun
from relora_ds.utils.files import write_text

logger = logging.getLogger(__name__)


def find_newest(
    run: StoredRun, run_dir: Path, require: Callable[[Manifest], None], is_same: Callable[[Manifest], bool]
) -> Found | None:
    """Return the newest intact checkpoint; what only the store has is fetched first. None to start anew. Collective.

    Args:
        require: raises ResumeError for a checkpoint that the run cannot resume from. Nothing is fetched then.
        is_same: whether every rank needs what the same rank wrote, so that a host with a disk of its own needs the
            files of its ranks only.

    Raises:
        ResumeError: on every rank, as `find` does, and where the store refuses.
    """
    stored = _stored(run)
    fetching = Fetching(run, run_dir / "checkpoints", require, is_same)
    floor, passed_over, found, problem = _newest_here(run_dir), [], None, None
    while True:
        while stored and step_of(stored[0]) > floor:
            reason = fetching.fetch(stored.pop(0))
            if reason is None:
                break
            passed_over.append(reason)
        try:
            found, problem = find(run_dir, "auto"), None
        except NoneIntactError as error:
            found, problem = None, error
        floor = -1 if found is None else found.manifest.step
        if not (stored and step_of(stored[0]) > floor):
            break
        passed_over += [str(problem)] if problem else found.passed_over if found else []
    if problem is not None:
        raise problem
    if found is None and passed_over:
        raise ResumeError(f"resume: {'; '.join(passed_over)}; no checkpoint is intact. Start again with overwrite=true")
    if found is None:
        return None
    if fetching.has_fetched:
        _fetch_metrics(run, run_dir)
    return dataclasses.replace(found, passed_over=(*passed_over, *found.passed_over))


def _stored(run: StoredRun) -> list[str]:
    """Return the tags of the complete checkpoints in the store, newest first, as rank 0 sees them."""
    said: list = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = run.complete()
        except RemoteError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, 0)
    if said[1] is not None:
        raise ResumeError(f"resume: {run.place.url} cannot be listed now ({said[1]}); start again when it can be")
    return said[0]


def _newest_here(run_dir: Path) -> int:
    """Return the step of the newest checkpoint that all ranks see, -1 without one."""
    names = of_all_ranks({path.name for path in directories(run_dir / "checkpoints")})
    return max(map(step_of, set.intersection(*names)), default=-1)


def _fetch_metrics(run: StoredRun, run_dir: Path) -> None:
    """Take the metrics that go with what was fetched. A run can do without."""
    if dist.get_rank() == 0:
        try:
            write_text(run_dir / METRICS, run.place.read(METRICS).decode(errors="replace"))
        except OSError as error:
            logger.warning("%s was not fetched, and begins anew: %s", METRICS, error)
