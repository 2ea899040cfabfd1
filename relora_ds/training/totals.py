"""What a run and its steps use."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass
class RunTotals:
    """What a run has used so far, saved with its checkpoints. Bytes are those of one rank."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    restarts: int = 0
    skipped: int = 0
    spikes: int = 0
    rollbacks: int = 0
    bytes_payload: float = 0.0
    bytes_wire: float = 0.0
    full_rank_payload: float = 0.0
    full_rank_wire: float = 0.0


class StepBytes(NamedTuple):
    """Bytes that one rank moves in a step."""

    payload: float = 0.0
    wire: float = 0.0
