"""The run directory as all ranks use it: locked by rank 0, rolled back to a checkpoint, with a status."""

import logging
import time

import torch.distributed as dist

from relora_ds.checkpoint import store
from relora_ds.checkpoint.find import Found, ResumeError
from relora_ds.checkpoint.run_files import read_json
from relora_ds.config import Recipe
from relora_ds.data import tokenizer_files
from relora_ds.interop.sources import TOKENIZER
from relora_ds.training.preflight import Plan
from relora_ds.training.run_directory import Claim
from relora_ds.utils.files import write_json, write_text

logger = logging.getLogger(__name__)


class OwnedDirectory:
    """A run's directory.

    Attributes:
        path: of it.
        is_open: whether the run may write there.
    """

    def __init__(self, recipe: Recipe):
        self.path, self._recipe = recipe.directory, recipe
        self._claim: Claim | None = None  # rank 0's
        self.is_open = False

    def claim(self) -> None:
        """Lock the directory on rank 0, again if it was moved. Collective.

        Raises:
            ResumeError: on every rank, where it cannot be this run's.
        """
        problem = [""]
        if dist.get_rank() == 0:
            try:
                if self._claim is None:
                    self._claim = Claim(self._recipe)
                else:
                    self._claim.renew()
            except (ValueError, OSError) as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem)
        if problem[0]:
            self.is_open = False
            raise ResumeError(problem[0])

    @property
    def previous_holder(self) -> str:
        """On rank 0, the process that had the directory before and cannot live, in words; "" without one."""
        return "" if self._claim is None else self._claim.previous_holder

    def is_held(self) -> bool:
        """Return True if rank 0 may write there now: what has its name may be another run's, if ours was moved."""
        return self.is_open and (self._claim is None or self._claim.is_held())

    def open(self, plan: Plan, checkpoint: Found | None) -> None:
        """Begin to write; when resuming, roll the directory back to the checkpoint. Collective, after `claim`."""
        if self._claim is not None:
            if not self.is_open:
                self.is_open = True
                # Before the old run's files go: what is left is a run, and not an ended one.
                self.set_status(0, "running")
                self._claim.begin()
            (self.path / "checkpoints").mkdir(exist_ok=True)
            tokenizer_files.save(plan.tokenizer, self.path / "checkpoints" / TOKENIZER)  # for their export
            write_text(self.path / "recipe.yaml", self._recipe.to_yaml())
            if checkpoint is not None:
                store.drop_after(self.path, checkpoint.manifest.step, checkpoint.damaged)
        dist.barrier()
        self.is_open = True

    def set_status(self, step: int, state: str, reason: str = "", exit_code: int | None = None) -> None:
        """Replace status.json: rank 0, or whichever rank failed first. No-op until the directory is open."""
        path = self.path / "status.json"
        if not (self.is_held() and (self._claim is not None or state == "failed")):
            return
        if state == "failed" and read_json(path).get("state") == "failed":
            return  # what failed first is the reason, what follows from it is not
        status = {"state": state, "step": step, "reason": reason, "exit_code": exit_code, "time": time.time()}
        try:
            write_json(path, status)
        except OSError as error:  # a full disk is no reason to stop
            logger.warning("status.json is not up to date: %s", error)

    def close(self) -> None:
        """Free the directory."""
        if self._claim is not None:
            self._claim.close()
