"""A Hugging Face `Trainer` that is one of several islands: its count of steps follows the engine's.

Where other islands have exchanged without this one, its engine makes the exchanges good, and its step `t` jumps. A step
that is not finite leaves `t` where it was. The Trainer counts one step each time, so it is corrected: all islands end
with the exchange of the last step.
"""

import logging
from typing import cast

from transformers import DefaultFlowCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

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


class IslandTraining(Trainer):
    """A `Trainer` that may be an island.

    Attributes:
        islands: the membership; None where it trains alone.
    """

    islands: Islands | None

    def set_initial_training_values(self, *args, **kwargs):
        """Return what the Trainer computes; of an island, with twice as many epochs: its steps end training."""
        # A step that is not finite is taken again, with data beyond the epochs that `max_steps` needs. Where as many
        # steps as that are not finite, training ends without the last exchange, and `end` warns of it.
        epochs, *others = super().set_initial_training_values(*args, **kwargs)
        return (epochs if self.islands is None else 2 * epochs, *others)

    def end_without_a_step(self) -> TrainOutput:
        """Evaluate and save where `control` says so, and end as the Trainer does."""
        if self.control.should_evaluate:
            self._evaluate(None, None)
        if self.control.should_save:
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, 0.0, {})


class StepsOfIsland:
    """Corrects and logs, for an engine that exchanges. Collective: all ranks make every call."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._t = 0

    @property
    def _engine(self) -> ReLoRAEngine:
        return cast(ReLoRAEngine, self._trainer.model_wrapped)

    def begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Join the other islands, and count from the engine's step.

        Raises:
            NothingLeftError: they have ended, and so has this one. `control` says what the Trainer does at its end.
        """
        engine = self._engine
        before = engine.t
        engine.exchange.begin()
        # Not by a difference: a checkpoint of a Trainer without islands counts steps that were not finite.
        self._t = state.global_step = self._trainer._globalstep_last_logged = engine.t
        if engine.t >= engine.lr_scheduler.last_step:
            if engine.t > before:
                DefaultFlowCallback().on_step_end(args, state, control)
            raise NothingLeftError

    def after_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Log the exchanges of a step; let the Trainer end when the engine has taken the last one."""
        engine = self._engine
        if self._corrects(state):
            control.should_training_stop = False
            DefaultFlowCallback().on_step_end(args, state, control)  # it has seen the wrong count
        should_log = control.should_log
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

    def _corrects(self, state: TrainerState) -> bool:
        """Correct the Trainer's count after a step by the engine's. Returns whether it was wrong."""
        taken, self._t = self._engine.t - self._t, self._engine.t
        state.global_step += taken - 1
        # The Trainer divides its sum of losses by the steps since then. Steps of other islands added none to the sum,
        # and one that was not finite did.
        self._trainer._globalstep_last_logged += taken - 1
        return taken != 1
