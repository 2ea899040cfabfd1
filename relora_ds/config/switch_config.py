"""Section of the method `switchlora`, whose rank is `relora.r`. The rules are in `relora_ds.lowrank.switching`."""

from dataclasses import dataclass
from typing import Annotated

from relora_ds.config.rules import Integer, Number


@dataclass(kw_only=True)
class SwitchLoRAConfig:
    """Method `switchlora` only; its rank is `relora.r`."""

    interval: Annotated[int, Integer(1)] = 40
    """Steps in which each row of A, and each column of B, is switched once, at the start of the run."""
    ratio: Annotated[float, Number("inside (0, 1)")] = 0.1
    """Part of the run after which they are switched 0.3 times as often."""
    freeze_steps: Annotated[int, Integer(1)] = 5
    """Steps for which a vector stays as it is after its counterpart was switched."""
