"""TensorBoard: RUN/tensorboard."""

from typing import Any

from relora_ds.training.hooks.loggers.logger import Logger


class TensorBoard(Logger):
    """Event files; of a resumed run, what earlier ones have past the checkpoint is hidden."""

    name = "TensorBoard"
    install = "tensorboard"

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if self.resume_step is None else self.resume_step + 1
        writer = SummaryWriter(self.run_dir / "tensorboard", purge_step=purge_step)
        self.resume_step = None  # a writer that replaces this one hides nothing
        return writer

    def _send(self, target: Any, values: dict[str, float], step: int) -> None:
        for tag, number in values.items():
            target.add_scalar(tag, number, step)
        _wait_until_written(target)

    def _send_text(self, target: Any, tag: str, markdown: str, step: int) -> None:
        target.add_text(tag, markdown, step)
        _wait_until_written(target)

    def _close(self, target: Any) -> None:
        target.close()


def _wait_until_written(target: Any) -> None:
    """Wait for the writer's thread, which opens the file by its name for every event.

    Later, another run may be where this one was: its directory would get them.
    """
    target.flush()
