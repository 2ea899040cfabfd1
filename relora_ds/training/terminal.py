"""What a person sees: rank 0's lines and progress bar, and a quiet library stack."""

import contextlib
import logging
import os
import warnings
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_format = warnings.formatwarning


def quieten_libraries() -> None:
    """Hide what a user cannot act on: DeepSpeed's INFO flood, start-up warnings of torch and transformers.

    RELORA_DS_VERBOSE=1 leaves everything as it is.
    """
    if os.environ.get("RELORA_DS_VERBOSE"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    from relora_ds.zero import accelerator

    accelerator.problems()  # imports deepspeed, which sets its logger's level
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|deepspeed)\..*")
    from relora_ds.data.reading import DataWarning

    # One rank of a host says what is to be said of its files, without the line of the program that it comes from.
    warnings.filterwarnings("ignore" if int(os.environ.get("LOCAL_RANK", 0)) else "once", category=DataWarning)
    warnings.formatwarning = lambda message, category, *place: (
        f"WARNING: {message}\n" if issubclass(category, DataWarning) else _format(message, category, *place)
    )


class Terminal:
    """Prints rank 0's lines; on the other ranks every call does nothing.

    On a terminal there is a progress bar at the bottom; elsewhere (a log file) a plain line per logged step.
    """

    def __init__(self, enabled: bool, total_steps: int):
        self.enabled = enabled
        self.console = Console(highlight=False, soft_wrap=True, quiet=not enabled)
        self._bar: Progress | None = None
        self._warned: set[str] = set()
        if enabled:
            logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True, handlers=[_LogLines(self)])
            logging.getLogger("relora_ds").setLevel(logging.INFO)
            if self.console.is_terminal:
                self._bar = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=8),  # all of it in 80 columns
                    TextColumn("{task.completed}/{task.total}"),
                    TextColumn("{task.fields[figures]}"),
                    TextColumn("eta"),
                    TimeRemainingColumn(),
                    console=self.console,
                )
                self._task = self._bar.add_task("starting", total=total_steps, figures="")
                self._bar.start()
        else:
            logging.getLogger("relora_ds").setLevel(logging.ERROR)

    @property
    def width(self) -> int:
        """Return the longest line that is not cut, in characters: the terminal's, 120 in a log file."""
        return self.console.width if self.console.is_terminal else 120

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        self._show(text, markup=False)

    def _show(self, what: object, markup: bool | None = None) -> None:
        with contextlib.suppress(OSError):  # the output goes to a file, and the disk is full
            self.console.print(what, markup=markup)

    def warn(self, text: str) -> None:
        """Print a warning, once: the libraries' loggers come here too."""
        if text not in self._warned:
            self._warned.add(text)
            self.line(f"warning: {text}")

    def step(self, step: int, total: int, phase: str, figures: str, logged: bool) -> None:
        """Show that a step is done; `figures` where it was logged."""
        if self._bar is not None:
            fields: dict[str, Any] = {"figures": figures} if logged else {}
            self._bar.update(self._task, completed=step, description=phase, **fields)
        elif logged:
            self.line(f"step {step:>6}/{total}  {phase:<10}  {figures}")

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table; the first column left, the others right."""
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._show(table)

    def close(self) -> None:
        """Take the bar away: it would swallow what is printed next."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _LogLines(logging.Handler):
    """Log records as lines of the terminal; what is more than information says so."""

    def __init__(self, terminal: Terminal):
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno == logging.WARNING:
            self._terminal.warn(text)
        else:
            self._terminal.line(text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}")
