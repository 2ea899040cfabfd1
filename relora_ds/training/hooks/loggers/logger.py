"""What a logger is, and what keeps its troubles from the run."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

from relora_ds.config import Recipe

logger = logging.getLogger(__name__)

RETRY_S = 60  # after an error, before a logger is opened again


class Logger:
    """Sends numbers and texts somewhere. An error of its own costs a warning and what was pending, never the run.

    Subclasses open what they send to at the first number, so that importing a package costs nothing before.

    Args:
        run_dir: the run's.
        resume_step: see `loggers_of`.
    """

    name: str
    install: str  # what pip installs

    def __init__(self, recipe: Recipe, run_dir: Path, resume_step: int | None):
        self.recipe, self.run_dir, self.resume_step = recipe, run_dir, resume_step
        self._target: Any = None
        self._retry_at = -math.inf

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by tag, such as "loss/train"."""
        if values:
            self._attempt(lambda target: self._send(target, values, step))

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Log a text, where there is a place for texts."""
        self._attempt(lambda target: self._send_text(target, tag, markdown, step))

    def close(self) -> None:
        """Send what is buffered. Later calls do nothing."""
        if self._target is not None:
            try:
                self._close(self._target)
            except Exception as error:
                self._fail(error)
        self._target, self._retry_at = None, math.inf

    # -- of a subclass -------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        raise NotImplementedError

    def _send(self, target: Any, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def _send_text(self, target: Any, tag: str, markdown: str, step: int) -> None:
        """Do nothing: not every package takes texts."""

    def _close(self, target: Any) -> None:
        raise NotImplementedError

    # -- for all -------------------------------------------------------------------------------------------------

    def _attempt(self, work: Any) -> None:
        try:
            if self._target is None:
                if time.monotonic() < self._retry_at:
                    return
                self._target = self._open()
            work(self._target)
        except ImportError as error:
            self._retry_at = math.inf
            logger.warning("log.to: %s cannot be imported (%s); pip install %s", self.name, error, self.install)
        except Exception as error:  # of its writing thread, of several kinds
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._target, self._retry_at = None, time.monotonic() + RETRY_S
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        logger.warning("%s lacks events (metrics.jsonl has the numbers): %s", self.name, reason)

    def _run_name(self) -> str:
        return self.run_dir.absolute().name

    def _settings(self) -> dict[str, Any]:
        """Return the recipe by dotted keys."""
        flat: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self.recipe).items():
            inner = value if isinstance(value, dict) else {"": value}
            flat |= {f"{name}.{key}".rstrip("."): entry for key, entry in inner.items()}
        return flat
