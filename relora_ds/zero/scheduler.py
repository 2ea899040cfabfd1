"""The learning-rate scheduler that an engine carries, and the record of its restarts.

One object counts the applied steps, lists the restarts and sets the learning rate, so that merges and
schedule cannot drift apart, also after a restart by hand or a resume. DeepSpeed calls `step()` after
every step that it applied (and not after one it skipped), and saves and loads this state with its
checkpoints.
"""

from dataclasses import asdict

import torch

from relora_ds.config.curve import ScheduleConfig
from relora_ds.lowrank.schedule import lr_multiplier


class ReLoRAScheduler:
    """Sets `lr = base · lr_multiplier(t)` of every parameter group.

    Attributes:
        t: applied optimizer steps.
        restarts: the steps after which restarts took place, ascending.
        stop: the step after which a phase ends before its curve does: no restart is due from there on. None: it does
            not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig):
        self.optimizer = optimizer
        self.config = config
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.t = 0
        self.restarts: list[int] = []
        self.stop: int | None = None
        self._apply()

    @property
    def multiplier(self) -> float:
        """The factor that update number `t + 1` uses."""
        return lr_multiplier(self.t, **asdict(self.config), restarts=self.restarts)

    def is_scheduled(self, t: int) -> bool:
        """Return whether the calendar has a restart directly after step `t`."""
        every = self.config.restart_every
        return 0 < t < self.last_step and t % every == 0 if every else False

    @property
    def last_step(self) -> int:
        """The step after which the curve, or the phase, ends."""
        return self.stop or self.config.total_steps

    @property
    def restart_due(self) -> bool:
        """Whether the schedule wants a restart now, directly after step `t`."""
        return self.is_scheduled(self.t) and self.t not in self.restarts

    def step(self) -> None:
        """Count one applied step. DeepSpeed calls this; you do not."""
        self.t += 1
        self._apply()

    def move_to(self, t: int) -> None:
        """Count steps as applied that this engine did not take."""
        self.t = t
        self._apply()

    def record_restart(self) -> None:
        """Note that a restart took place now: the ramp starts at this step."""
        assert self.t not in self.restarts
        self.restarts.append(self.t)
        self._apply()

    def get_last_lr(self) -> list[float]:
        """Return the learning rates that the next step uses, by group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    @property
    def last_multiplier(self) -> float:
        """The factor that update number `t` has used; `t` is above 0."""
        return lr_multiplier(self.t - 1, **asdict(self.config), restarts=self.restarts)

    def state_dict(self) -> dict:
        return {"t": self.t, "restarts": list(self.restarts)}

    def load_state_dict(self, state: dict) -> None:
        self.t, self.restarts = state["t"], list(state["restarts"])
        self._apply()

    def _apply(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.multiplier
