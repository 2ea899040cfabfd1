"""The order of CUDA streams, where DeepSpeed leaves it to chance."""

import torch
from deepspeed import DeepSpeedEngine

from relora_ds.zero import accelerator


def order_gathers(engine: DeepSpeedEngine) -> None:
    """Have ZeRO-3's gathers wait until the partitions are written.

    With `overlap_comm`, which is DeepSpeed's default on GPUs, they run on a stream of their own that waits for nothing.
    So a forward after a step or a restart may gather partitions that the optimizer is still writing. (DeepSpeed's
    throughput timer, which is off here, hides that in training: it stops the host until the GPU is idle.) Now a forward
    of the whole model begins with a wait, of that stream and not of the host.
    """
    if engine.zero_optimization_stage() < 3 or not accelerator.is_cuda():
        return
    stream = getattr(engine.optimizer.parameter_offload, "_DeepSpeedZeRoOffload__allgather_stream", None)

    def wait(*_) -> None:
        if stream is None:  # another DeepSpeed
            torch.cuda.synchronize()
        else:
            stream.wait_stream(torch.cuda.current_stream())

    engine.module.register_forward_pre_hook(wait, prepend=True)
