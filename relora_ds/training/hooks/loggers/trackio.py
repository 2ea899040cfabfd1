"""Trackio: RUN/trackio, or where TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

import contextlib
import io
import os
from typing import Any

from relora_ds.training.hooks.loggers.logger import Logger


class Trackio(Logger):
    """A run in the project relora_ds. A resumed run continues under the same name."""

    name = "Trackio"
    install = "trackio"

    def _open(self) -> Any:
        os.environ.setdefault("TRACKIO_DIR", str((self.run_dir / "trackio").absolute()))  # read at the import
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):  # how to look at it, at each start
            return trackio.init(
                "relora_ds",
                name=self._run_name(),
                config=self._settings(),
                resume="never" if self.resume_step is None or self.resume_step < 0 else "allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def _send(self, target: Any, values: dict[str, float], step: int) -> None:
        target.log(values, step=step)

    def _close(self, target: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            target.finish()
