"""Loss spikes: losses far above those of the steps before."""

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


@dataclass(frozen=True)
class Spike:
    """A loss, nats per token, that is `zscore` robust standard deviations above the `median` of those before it."""

    loss: float
    median: float
    zscore: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4f} is {self.zscore:.1f} robust deviations above the median {self.median:.4f}"


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
