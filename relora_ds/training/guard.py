"""Which steps are not to be trusted, and when to give up.

non-finite    DeepSpeed and the engine find it: no rank applies the step
loss spike    found here, in a loss far above those before it; `guard.on_spike` says what follows
too many      steps in a row that were not applied end the run
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from relora_ds.config import GuardConfig

WINDOW = 128  # losses that a new one is compared with
_FEWEST = 32
# Of the median: in a calm stretch, whose losses hardly deviate, everything would be far above it.
_LEAST_DEVIATION = 0.01
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


class GuardError(RuntimeError):
    """The run stops itself (exit code 3)."""


@dataclass(frozen=True)
class Spike:
    """A loss, nats per token, that is `zscore` robust standard deviations above the `median` of those before it."""

    loss: float
    median: float
    zscore: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4f} is {self.zscore:.1f} robust deviations above the median {self.median:.4f}"


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


class LossSpikes:
    """Compares each loss with the window of those before it.

    The median and the median absolute deviation stay what they were while the window fills with outliers, up to half
    of it; a mean and a standard deviation would not survive the first one.

    Attributes:
        losses: the window, oldest first. It is saved with a checkpoint.
    """

    def __init__(self, settings: GuardConfig, losses: Iterable[float] = ()):
        self._limit = settings.spike_zscore
        self.screens = settings.on_spike in ("skip", "rollback")  # before the step is applied, not afterwards
        self.losses = deque(losses, maxlen=WINDOW)

    def take(self, loss: float) -> Spike | None:
        """Judge a step's loss (mean over all ranks). The window takes it, unless its step is refused for it."""
        if not math.isfinite(loss):
            return None  # its step is not applied
        spike = self._judge(loss)
        if spike is None or not self.screens:
            self.losses.append(loss)
        return spike

    def _judge(self, loss: float) -> Spike | None:
        if len(self.losses) < _FEWEST:
            return None
        middle = median(self.losses)
        deviation = max(_MAD_TO_SIGMA * median(abs(value - middle) for value in self.losses), _LEAST_DEVIATION * middle)
        zscore = (loss - middle) / deviation
        return Spike(loss, middle, zscore) if zscore > self._limit else None
