"""Weights & Biases: RUN/wandb, offline unless WANDB_MODE=online; `wandb sync RUN/wandb/offline-run-*` uploads it."""

import logging
import os
from typing import Any

from relora_ds.training.hooks.loggers.logger import Logger

logger = logging.getLogger(__name__)


class WandB(Logger):
    """A run in the project WANDB_PROJECT, or relora_ds. A resumed run continues under the same id."""

    name = "Weights & Biases"
    install = "wandb"

    def _open(self) -> Any:
        import wandb

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "relora_ds"),
            name=self._run_name(),
            id=os.environ.get("WANDB_RUN_ID") or self._earlier_id(),
            resume="allow",
            dir=self.run_dir,
            mode="online" if self._is_online(wandb) else "offline",
            config=self._settings(),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", symlink=False, disable_git=True),
        )
        run.define_metric("*", step_metric="step")  # its own count would refuse steps that are taken again
        return run

    def _is_online(self, wandb: Any) -> bool:
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode != "online":
            return False
        if os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False):
            return True
        logger.warning(
            "WANDB_MODE: online, and there is no API key (WANDB_API_KEY, or `wandb login`); what is logged stays in %s",
            self.run_dir / "wandb",
        )
        return False

    def _earlier_id(self) -> str | None:
        """Return the id of the newest run in this directory, if this one is resumed."""
        if self.resume_step is None or self.resume_step < 0:
            return None
        found = sorted((self.run_dir / "wandb").glob("*run-*-*"), key=lambda path: path.name.rpartition("run-")[2])
        return found[-1].name.rpartition("-")[2] if found else None

    def _send(self, target: Any, values: dict[str, float], step: int) -> None:
        target.log({**values, "step": step})

    def _close(self, target: Any) -> None:
        target.finish()
