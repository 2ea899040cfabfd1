"""A Hugging Face `Trainer` that is one of several islands: its count of steps follows the engine's.

Where other islands have exchanged without this one, its engine makes the exchanges good, and its step `t` jumps. A step
that is not finite leaves `t` where it was. The Trainer counts one step each time, so it is corrected: all islands end
with the exchange of the last step.
"""

import logging
from typing import cast

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from relora_ds.config import IslandsConfig
from relora_ds.exchange.island import Islands
from relora_ds.zero.engine import ReLoRAEngine

logger = logging.getLogger(__name__)


class NothingLeftError(Exception):
    """Every exchange is made good, and no step is left to train."""


def membership(islands: IslandsConfig | Islands | None, args: TrainingArguments) -> Islands | None:
    """Return the membership that a Trainer is given.

    Raises:
        ValueError: see `Islands`.
    """
    if not isinstance(islands, IslandsConfig):
        return islands
    kept = args.save_total_limit or 3  # without a limit: that it comes back from one of the newest
    return Islands(islands, kept_checkpoints=kept + 1)  # one more is there while the oldest is deleted


class StepsOfIsland:
    """Corrects and logs, for an engine that exchanges. Collective: all ranks make every call."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._t = 0

    @property
    def _engine(self) -> ReLoRAEngine:
        return cast(ReLoRAEngine, self._trainer.model_wrapped)

    def begin(self, state: TrainerState) -> None:
        """Join the other islands.

        Raises:
            NothingLeftError: they have ended, and so has this one.
        """
        engine = self._engine
        self._t = engine.t
        engine.exchange.begin()
        self._follow(state, steps_counted=0)
        if engine.t >= engine.lr_scheduler.last_step:
            raise NothingLeftError

    def after_step(self, state: TrainerState, control: TrainerControl) -> None:
        """Log the exchanges of a step; let the Trainer end when the engine has taken the last one."""
        engine, should_log = self._engine, control.should_log
        if self._follow(state, steps_counted=1):
            control.should_training_stop = state.global_step >= state.max_steps
        for report in engine.exchange.take_reports():
            self._trainer.log(
                {
                    "exchanges": report.round,
                    "exchange_islands": len(report.islands),
                    "exchange_bytes_sent": report.bytes_sent,
                    "exchange_s": report.exchange_s,
                }
            )
        control.should_log = should_log  # log() clears it

    def end(self) -> None:
        """Warn where the last exchange has not taken place."""
        engine = self._engine
        if engine.t < engine.lr_scheduler.last_step:
            logger.warning(
                "islands: training has ended after step %d of %d, without the last exchange: the others continue "
                "without this island",
                engine.t,
                engine.lr_scheduler.last_step,
            )

    def _follow(self, state: TrainerState, steps_counted: int) -> bool:
        """Add to the Trainer's count what it has not seen. Returns whether that was anything."""
        before, self._t = self._t, self._engine.t
        unseen = self._t - before - steps_counted
        state.global_step += unseen
        if unseen > 0:
            self._trainer._globalstep_last_logged += unseen  # they have no losses to take the mean of
        return unseen != 0
