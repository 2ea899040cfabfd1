"""Bytes that steps move, and those that full rank would have moved."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from relora_ds.lowrank.wrap import count_parameters
from relora_ds.models.build import meta_model
from relora_ds.training.hooks.hook import Hook
from relora_ds.training.state import RunState
from relora_ds.training.totals import RunTotals, StepBytes
from relora_ds.zero.engine import ReLoRAEngine
from relora_ds.zero.traffic import count_traffic, expected_step


class Traffic(Hook):
    """Times every step, and counts the bytes of some: collectives are the same in every step of a phase, but restarts.

    Sampled are an engine's first three steps (ZeRO-3 still records its trace there), those that a restart follows, the
    first one with a residual update, which stands for all of them, and those that send the factors of a new round.
    """

    def on_phase(self, run: RunState) -> None:
        engine = run.engine
        self._first = engine.t  # a resumed engine does not begin at 0
        self._regular = StepBytes()
        self._with_update: StepBytes | None = None
        self._full_rank = StepBytes(
            *expected_step(
                engine.zero_optimization_stage(),
                trainable=count_parameters(meta_model(run.plan.model_config))[0],
                frozen_bytes=0,
                element_size=element_size(engine),
                accumulation=engine.gradient_accumulation_steps(),
                world_size=engine.dp_world_size,
            )
        )

    @contextmanager
    def around_step(self, run: RunState) -> Iterator[None]:
        engine, restarts = run.engine, len(run.engine.restarts)
        updates = engine.residual is not None and engine.residual.is_due(engine.t + 1)
        sampling = engine.t - self._first in (0, 1, 2) or engine.lr_scheduler.is_scheduled(engine.t + 1)
        sampling = sampling or (updates and self._with_update is None)
        sends_more = engine.owner_steps is not None and engine.owner_steps.sends_more
        with run.clock.step(sampling), count_traffic() if sampling or sends_more else nullcontext() as sample:
            yield
        known = self._with_update if updates and self._with_update is not None else self._regular
        run.step_bytes = known if sample is None else StepBytes(float(sample.payload), sample.wire)
        if engine.was_step_applied() and len(engine.restarts) == restarts and not sends_more:
            if updates:
                self._with_update = run.step_bytes
            else:
                self._regular = run.step_bytes
        self._add(run.totals, run.step_bytes)

    def _add(self, totals: RunTotals, moved: StepBytes) -> None:
        totals.bytes_payload += moved.payload
        totals.bytes_wire += moved.wire
        totals.full_rank_payload += self._full_rank.payload
        totals.full_rank_wire += self._full_rank.wire


def element_size(engine: ReLoRAEngine) -> int:
    """Return the bytes of an element in gradient and weight collectives."""
    return 2 if engine.bfloat16_enabled() or engine.fp16_enabled() else 4
