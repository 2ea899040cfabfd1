"""What a run has used: steps, tokens, seconds and bytes, and the bytes that full rank would have moved."""

from dataclasses import asdict, dataclass

from relora_ds.zero.traffic import Traffic, expected_step


@dataclass
class Account:
    """Totals of a run, saved with its checkpoints. Bytes are those of one rank."""

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

    def count_step(self, tokens: int, traffic: "StepTraffic") -> None:
        """Add what a step used, applied or not; its seconds are the `StepClock`'s to add."""
        self.tokens += tokens
        self.bytes_payload += traffic.payload
        self.bytes_wire += traffic.wire
        self.full_rank_payload += traffic.full_rank[0]
        self.full_rank_wire += traffic.full_rank[1]

    def state(self) -> dict:
        return asdict(self)


class StepTraffic:
    """Bytes per step from sampled steps: collectives are the same in every step of a phase, but for restarts.

    This engine's first three steps are sampled (ZeRO-3 still records its trace there), and every step that ends with a
    restart.
    """

    def __init__(self, engine, full_rank_elements: int):
        self._engine, self._first = engine, engine.t  # a resumed engine does not begin at 0
        stage = engine.zero_optimization_stage()
        self.full_rank = expected_step(
            stage,
            trainable=full_rank_elements,
            frozen_bytes=0,
            element_size=element_size(engine),
            accumulation=engine.gradient_accumulation_steps(),
            world_size=engine.dp_world_size,
        )
        self.payload = self.wire = 0.0
        self._regular = (0.0, 0.0)

    def wants_sample(self) -> bool:
        """Whether the coming step should be counted."""
        return self._engine.t - self._first in (0, 1, 2) or self._engine.lr_scheduler.is_scheduled(self._engine.t + 1)

    def record(self, sample: Traffic | None, is_regular: bool) -> None:
        """Set `payload` and `wire` of the step that has just been taken; a regular one stands for those to come."""
        if sample is None:
            self.payload, self.wire = self._regular
            return
        self.payload, self.wire = float(sample.payload), sample.wire
        if is_regular:
            self._regular = (self.payload, self.wire)


def element_size(engine) -> int:
    """Bytes of an element in gradient and weight collectives."""
    return 2 if engine.bfloat16_enabled() or engine.fp16_enabled() else 4
