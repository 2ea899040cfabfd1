"""ZeRO-3 on GPUs: what is gathered has been written. On emulated ones, of which the order of calls is looked at."""

import pytest
import torch
from deepspeed.runtime.zero import partition_parameters

from tests.emulated_cuda import engines
from tests.emulated_cuda.pool import emulated_ranks


def order_of_calls() -> list[str]:
    """Steps, waits of the stream that gathers, and gathers, with an evaluation and a probe of the module at the end."""
    engine, calls = engines.build(3), []
    stream = engine.optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
    step, gather = engine.optimizer.step, partition_parameters._dist_allgather_fn

    def noted(name: str, function=lambda *_: None):
        def call(*args, **kwargs):
            if name != "wait" or args[0] is stream:
                calls.append(name)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(type(stream), "wait_stream", noted("wait"))
        monkeypatch.setattr(partition_parameters, "_dist_allgather_fn", noted("gather", gather))
        monkeypatch.setattr(engine.optimizer, "step", noted("step", step))
        engines.train(engine, range(engines.EVERY + 1))
        engine.eval()
        with torch.no_grad():
            for model in (engine, engine.module):
                calls.append("step")  # as if there had been one
                engine.optimizer.empty_partition_cache()
                model(input_ids=torch.ones(2, 5, dtype=torch.long, device=engine.device))
    engines.release(engine)
    return calls


def test_a_gather_after_a_step_waits_for_what_the_step_writes():
    for calls in emulated_ranks().run(order_of_calls):
        after = [rest.split() for rest in " ".join(calls).split("step")]
        assert len(after) == 1 + engines.EVERY + 1 + 2
        assert all(calls[:1] == ["wait"] for calls in after if "gather" in calls), after
        assert sum("gather" in calls for calls in after) >= 6
