"""The state of an engine that is no tensor: counters, the schedule, Adam's steps and fp16's loss scale.

It says nothing about ZeRO stages or ranks: an engine of another stage and world size can resume from it.
"""

from relora_ds.checkpoint.contents import DECAY, ISLANDS, OWNERS, RESIDUAL

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_RESIDUAL = ("steps", "count")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def engine_state(engine) -> dict:
    """JSON values; the same on every rank."""
    scaler = _scaler(engine) if engine.fp16_enabled() else None
    return {
        "scheduler": engine.lr_scheduler.state_dict(),
        "adam_steps": engine.shards.adam_steps(),
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "loss_scaler": {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)},
        **({} if engine.frozen.decay is None else {DECAY: float(engine.frozen.decay)}),
        **({} if engine.residual is None else {RESIDUAL: {key: getattr(engine.residual, key) for key in _RESIDUAL}}),
        **({} if engine.owned_state is None else {OWNERS: engine.owned_state.about()}),
        **({} if engine.exchange is None else {ISLANDS: engine.exchange.state()}),
    }


def restore_engine_state(engine, state: dict, *, optimizer: bool = True, schedule: bool = True) -> None:
    """Resume from what `engine_state` returned.

    Args:
        optimizer: with Adam's steps and the loss scale.
        schedule: with the scheduler and the counters of steps.
    """
    if (decay := state.get(DECAY, 1.0)) != 1 or engine.frozen.decay is not None:
        engine.frozen.set_decay(decay)
    if schedule:
        engine.lr_scheduler.load_state_dict(state["scheduler"])
        for name in _COUNTERS:
            setattr(engine, name, state["counters"][name])
        if engine.residual is not None:
            engine.residual.count = state.get(RESIDUAL, {"count": 0})["count"]
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    engine.num_accumulated = 0
    if not optimizer:
        return
    engine.shards.set_adam_steps({group: _steps_of(group, state["adam_steps"]) for group in engine.shards.adam_steps()})
    if not engine.fp16_enabled():  # DeepSpeed's bf16 wrapper of stage 0 has a scale too, and would divide by it
        return
    scaler = _scaler(engine)
    for name, value in state["loss_scaler"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _steps_of(group: str, saved: dict[str, int]) -> int:
    """Return Adam's step count of a parameter group. saved: by the names that the groups had."""
    if group == "lora_A" and group not in saved:  # one group with B where there was no weight decay
        group = "lora"
    # Of a group that was none, the largest: with less than their own, moments would be taken for young ones, and a step
    # would be many times as long.
    return saved.get(group, max(saved.values(), default=0))


def _scaler(engine):
    """Return what holds the loss scale, where there is one; DeepSpeed's 16-bit wrappers of stage 0 rename it."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
